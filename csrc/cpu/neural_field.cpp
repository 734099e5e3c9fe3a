// neural_field and its backward on the CPU. The forward has one task per patch, the backward one per group of patches.
#include <cstdlib>
#include <memory>

#include "cpu/field/params.h"
#include "cpu/launch.h"

namespace flowseg::cpu {

namespace {

#if defined(FLOWSEG_X86)
bool has_bf16_products() {
  static const bool has = [] {
    // FLOWSEG_CPU_ISA=avx512 excludes them, so that tests can run both ways on one CPU.
    const char* name = std::getenv("FLOWSEG_CPU_ISA");
    return instruction_set() == Isa::avx512 && __builtin_cpu_supports("avx512bf16") && !(name && !std::strcmp(name, "avx512"));
  }();
  return has;
}
#endif

// Calls run(FieldKernels<isa>{}) for the best instruction set that this CPU has and that serves the field.
template <class Run>
void with_field_kernels([[maybe_unused]] const Field& a, Run run) {
#if defined(FLOWSEG_X86)
  if (a.x.type == Real::bf16 && a.weight_type == Real::bf16 && a.hidden % 2 == 0 && has_bf16_products()) {
    return run(FieldKernels<Isa::avx512bf16>{});
  }
  switch (instruction_set()) {
    case Isa::avx512: return run(FieldKernels<Isa::avx512>{});
    case Isa::avx2: return run(FieldKernels<Isa::avx2>{});
    default: break;
  }
#endif
  run(FieldKernels<Isa::baseline>{});
}

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Memory = std::unique_ptr<float, Free>;

template <class Kernels>
Memory scratch_of(Kernels kernels, const Field& a, bool backward) {
  const size_t bytes = (kernels.scratch(a, backward) * sizeof(float) + 63) / 64 * 64;
  Memory memory(static_cast<float*>(std::aligned_alloc(64, bytes)));
  FLOWSEG_CHECK(memory, "weights: no memory for the states of one patch (", bytes, " bytes)");
  return memory;
}

const float* floats_of(const Tensor& t, const char* name) {
  FLOWSEG_CHECK(t.is_contiguous() && t.scalar_type() == ScalarType::Float, name, ": wanted a contiguous float32 tensor");
  return static_cast<const float*>(t.const_data_ptr());
}

// The inputs of forward and backward, with the padded table that they point to.
struct FieldInputs {
  FieldInputs(const Tensor& x, const Tensor& weights, const Tensor& table, const Tensor& embed, const Tensor& norm,
              const Tensor& out_norm, const Tensor& out_weight, const Tensor& out_bias, int64_t patch_size, int64_t mlp_ratio,
              double eps, bool both, bool residual) {
    field.x = image_of(x, "x");
    FLOWSEG_CHECK(weights.dim() == 4 && weights.stride(3) == 1, "weights: wanted blocks contiguous");
    field.weights = weights.const_data_ptr();
    field.weight_type = real_of(weights, "weights");
    for (int i = 0; i < 3; ++i) field.weight_stride[i] = weights.stride(i);
    field.hidden = table.size(0);
    field.inner = mlp_ratio * field.hidden;
    field.depth = weights.size(2);
    field.patch_size = patch_size;
    field.embed = floats_of(embed, "embed_weight");
    field.gains = residual ? floats_of(norm, "norm_weight") : nullptr;
    field.out_gain = residual ? floats_of(out_norm, "out_norm_weight") : nullptr;
    field.out_weight = floats_of(out_weight, "out_weight");
    field.out_bias = floats_of(out_bias, "out_bias");
    field.eps = static_cast<float>(eps);
    field.both = both;
    field.residual = residual;

    const int64_t pixels = patch_size * patch_size;
    field.padded = (pixels + kPixelPad - 1) / kPixelPad * kPixelPad;
    // Pixels in the padding are computed but never read. Ones keep their norms finite if eps is 0.
    padded_table_.assign(field.hidden * field.padded, 1.0f);
    const float* from = floats_of(table, "table");
    for (int64_t i = 0; i < field.hidden; ++i) {
      std::memcpy(padded_table_.data() + i * field.padded, from + i * pixels, pixels * sizeof(float));
    }
    field.table = padded_table_.data();
    patches = field.x.batch * (field.x.height / patch_size) * (field.x.width / patch_size);
  }
  FieldInputs(const FieldInputs&) = delete;

  Field field{};
  int64_t patches;

 private:
  std::vector<float> padded_table_;
};

// Gradients of shared parameters are summed within groups of patches, at most kPatchGroups groups. The sums of the groups are added
// in order, so results do not depend on the number of threads.
constexpr int64_t kPatchGroups = 64;

}  // namespace

Tensor neural_field(Tensor x, Tensor weights, Tensor table, Tensor embed, Tensor norm, Tensor out_norm, Tensor out_weight,
                    Tensor out_bias, int64_t patch_size, int64_t mlp_ratio, double eps, bool both, bool residual) {
  FieldInputs inputs(x, weights, table, embed, norm, out_norm, out_weight, out_bias, patch_size, mlp_ratio, eps, both, residual);
  Field& a = inputs.field;
  Tensor out = empty_like_shape(x, x.scalar_type(), {a.x.batch, a.x.channels, a.x.height, a.x.width});
  a.out = output_of(out);
  with_field_kernels(a, [&](auto kernels) {
    torch::stable::parallel_for(0, inputs.patches, 1, [&](int64_t begin, int64_t end) {
      const Memory memory = scratch_of(kernels, a, false);
      kernels.forward(a, begin, end, memory.get());
    });
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> neural_field_bwd(
    Tensor grad, Tensor x, Tensor weights, Tensor table, Tensor embed, Tensor norm, Tensor out_norm, Tensor out_weight,
    Tensor out_bias, int64_t patch_size, int64_t mlp_ratio, double eps, bool both, bool residual, bool need_x, bool need_weights) {
  FieldInputs inputs(x, weights, table, embed, norm, out_norm, out_weight, out_bias, patch_size, mlp_ratio, eps, both, residual);
  const Field& a = inputs.field;
  const auto empty = [&](const Tensor& like, ScalarType type, bool needed, std::vector<int64_t> shape) {
    return empty_like_shape(like, type, needed ? shape : std::vector<int64_t>{0});
  };
  Tensor grad_x = empty(x, x.scalar_type(), need_x, {a.x.batch, a.x.channels, a.x.height, a.x.width});
  Tensor grad_weights = empty(weights, weights.scalar_type(), need_weights,
                              {weights.size(0), weights.size(1), weights.size(2), weights.size(3)});
  const FieldBackward b{
      .field = a,
      .grad = image_of(grad, "grad"),
      .grad_x = need_x ? output_of(grad_x) : Output{nullptr, a.x.type},
      .grad_weights = need_weights ? output_of(grad_weights) : Output{nullptr, a.weight_type},
  };

  const FieldSums at(a.hidden, a.x.channels, a.depth, a.padded);
  const int64_t patches_per_group = std::max<int64_t>(1, (inputs.patches + kPatchGroups - 1) / kPatchGroups);
  const int64_t groups = (inputs.patches + patches_per_group - 1) / patches_per_group;
  const std::unique_ptr<float[]> sums(new float[groups * at.size]);
  with_field_kernels(a, [&](auto kernels) {
    torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
      const Memory memory = scratch_of(kernels, a, true);
      for (int64_t group = begin; group < end; ++group) {
        const int64_t first = group * patches_per_group, last = std::min(inputs.patches, first + patches_per_group);
        kernels.backward(b, first, last, memory.get(), sums.get() + group * at.size);
      }
    });
  });

  std::vector<double> total(at.size);
  for (int64_t group = 0; group < groups; ++group) {
    const float* from = sums.get() + group * at.size;
    for (int64_t i = 0; i < at.size; ++i) total[i] += from[i];
  }
  const auto result = [&](int64_t offset, std::vector<int64_t> shape) {
    Tensor t = empty_like_shape(table, ScalarType::Float, shape);
    float* to = static_cast<float*>(t.data_ptr());
    for (int64_t i = 0; i < t.numel(); ++i) to[i] = static_cast<float>(total[offset + i]);
    return t;
  };
  Tensor by_position = empty_like_shape(table, ScalarType::Float, {a.hidden, patch_size * patch_size});
  float* to = static_cast<float*>(by_position.data_ptr());
  for (int64_t i = 0; i < a.hidden; ++i) {
    for (int64_t m = 0; m < patch_size * patch_size; ++m) *to++ = static_cast<float>(total[at.position + i * a.padded + m]);
  }
  return {grad_x, grad_weights, by_position, result(at.embed, {a.hidden, a.x.channels}),
          result(at.gains, {residual ? a.depth : 0, a.hidden}), result(at.out_gain, {residual ? a.hidden : 0}),
          result(at.out_weight, {a.x.channels, a.hidden}), result(at.out_bias, {a.x.channels})};
}

STABLE_TORCH_LIBRARY_IMPL(flowseg_cpu, CPU, m) {
  m.impl("neural_field", TORCH_BOX(&neural_field));
  m.impl("neural_field_bwd", TORCH_BOX(&neural_field_bwd));
}

}  // namespace flowseg::cpu
