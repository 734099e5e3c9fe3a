// The blocks of the neural field's backward: declared here until the kernel exists.
#pragma once

#include "cuda/field/params.h"

namespace flowseg::cuda {

template <class Launch>
void launch_backward_blocks(const FieldParams& f, Real type, const Launch& launch);

}  // namespace flowseg::cuda
