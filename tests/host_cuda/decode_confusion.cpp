// decode_confusion of csrc/cuda on the CPU.
#include "cuda/decode_confusion.cuh"

#include "arrays.h"

namespace flowseg::cuda {

void emulate_decode_confusion(const Array& x, const Array& y, const Array& mu, const Array& cells, const Array& records, const Array& groups,
                          double low, double scale, int64_t ignore, const Array& counts) {
  launch_confusion({source(x), labels(y, ignore), codes(mu), grid(cells, records, groups, low, scale),
                    static_cast<unsigned long long*>(counts.data), {}},
                   OnCpu{});
}

}  // namespace flowseg::cuda
