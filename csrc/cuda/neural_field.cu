// neural_field and its backward on torch's CUDA tensors. Compiled for sm_90a only.
#include "cuda/field/launch.cuh"
#include "cuda/hopper/tensor_map.h"
#include "cuda/launch.h"

namespace flowseg::cuda {

namespace {

constexpr int64_t kMostPixelsOfSide = 2048;  // of a patch: the bytes of its state are an int

std::vector<int64_t> sizes_of(const Tensor& t) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < t.dim(); ++i) sizes.push_back(t.size(i));
  return sizes;
}

// The inputs of both ops. The members keep the tensors alive.
struct FieldInputs {
  Tensor x, weights, embed, embed_bias, norm, out_norm, out_weight, out_bias;
  FieldOptions options;

  // Checks the tensors and returns them as parameters of the kernels.
  FieldParams params() const {
    const Image image = image_of(x, "x");
    FLOWSEG_CHECK(embed_bias.dim() == 1 && weights.dim() == 4, "embed_bias: wanted shape (Hx,), and weights (B, N, L, 2 r Hx^2)");
    const int64_t hidden = embed_bias.size(0), p = options.patch_size;
    FLOWSEG_CHECK(p <= kMostPixelsOfSide, "patch_size: wanted at most ", kMostPixelsOfSide, "; got ", p);
    FLOWSEG_CHECK(p >= 1 && options.mlp_ratio >= 1 && image.height % p == 0 && image.width % p == 0,
                  "x: wanted height and width divisible by patch_size ", p);
    const int64_t per_image = (image.height / p) * (image.width / p);
    FLOWSEG_CHECK(p * image.width <= INT32_MAX, "x: wanted patch_size times width below 2^31; got a width of ", image.width);
    FLOWSEG_CHECK(image.batch * per_image * std::max<int64_t>(1, weights.size(2)) <= INT32_MAX,
                  "weights: wanted fewer than 2^31 blocks in all patches");
    FLOWSEG_CHECK(image.channels >= 1 && image.channels <= kMostChannels, "x: wanted 1 to 16 channels; got ", image.channels);
    FLOWSEG_CHECK(hidden >= 8 && hidden <= kMostHidden && hidden % 8 == 0,
                  "embed_bias: wanted Hx a multiple of 8, at most ", kMostHidden, "; got ", hidden);
    FLOWSEG_CHECK(reinterpret_cast<uintptr_t>(weights.data_ptr()) % 16 == 0, "weights: wanted an address divisible by 16");
    FLOWSEG_CHECK(embed.dim() == 2 && embed.size(1) > image.channels, "embed_weight: wanted shape (Hx, C + F^2)");
    check("weights", weights, {image.batch, per_image, weights.size(2), 2 * options.mlp_ratio * hidden * hidden});
    check("embed_weight", embed, {hidden, embed.size(1)});
    check("embed_bias", embed_bias, {hidden});
    check("out_weight", out_weight, {image.channels, hidden});
    check("out_bias", out_bias, {image.channels});
    if (options.residual) {
      check("norm_weight", norm, {weights.size(2), hidden});
      check("out_norm_weight", out_norm, {hidden});
    }
    const FieldShared shared{.embed = embed.data_ptr(),
                             .embed_bias = embed_bias.data_ptr(),
                             .gains = norm.data_ptr(),
                             .out_gain = out_norm.data_ptr(),
                             .out_weight = out_weight.data_ptr(),
                             .out_bias = out_bias.data_ptr()};
    const FieldParams f = field_params(image, weights.data_ptr(), weights.size(2), shared, hidden, embed.size(1), options);
    FLOWSEG_CHECK(image.channels + int64_t{f.freqs} * f.freqs == embed.size(1), "embed_weight: wanted shape (Hx, C + F^2)");
    return f;
  }

 private:
  void check(const char* name, const Tensor& t, const std::vector<int64_t>& shape) const {
    FLOWSEG_CHECK(sizes_of(t) == shape, name, ": wrong shape");
    FLOWSEG_CHECK(t.is_cuda() && t.is_contiguous(), name, ": wanted a contiguous CUDA tensor");
    FLOWSEG_CHECK(t.scalar_type() == x.scalar_type() &&
                      (x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half),
                  name, ": wanted bfloat16 or float16, as x has");
  }
};

Tensor scratch_of(const FieldParams& f, bool backward, const Tensor& like, const HopperLaunch& launch) {
  return empty_like_shape(like, ScalarType::Byte, {field_scratch(f, backward, launch)});
}

Tensor neural_field(Tensor x, Tensor weights, Tensor embed_weight, Tensor embed_bias, Tensor norm_weight, Tensor out_norm_weight,
                    Tensor out_weight, Tensor out_bias, int64_t patch_size, int64_t mlp_ratio, double eps, bool both,
                    bool residual) {
  const FieldInputs inputs{x,          weights,  embed_weight, embed_bias, norm_weight, out_norm_weight,
                           out_weight, out_bias, {patch_size, mlp_ratio, eps, both, residual}};
  FieldParams f = inputs.params();
  Tensor out = empty_like_shape(x, x.scalar_type(), shape_of(f.x));
  if (f.patches == 0) return out;
  f.out = out.data_ptr();
  const HopperLaunch launch(x);
  const Tensor scratch = scratch_of(f, false, x, launch);
  launch_field(f, f.x.type, scratch.data_ptr(), launch);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> neural_field_bwd(
    Tensor grad, Tensor x, Tensor weights, Tensor embed_weight, Tensor embed_bias, Tensor norm_weight, Tensor out_norm_weight,
    Tensor out_weight, Tensor out_bias, int64_t patch_size, int64_t mlp_ratio, double eps, bool both, bool residual) {
  const FieldInputs inputs{x,          weights,  embed_weight, embed_bias, norm_weight, out_norm_weight,
                           out_weight, out_bias, {patch_size, mlp_ratio, eps, both, residual}};
  FieldParams f = inputs.params();
  f.grad = image_of(grad, "grad");
  FLOWSEG_CHECK(shape_of(f.grad) == shape_of(f.x) && f.grad.type == f.x.type, "grad: wanted the shape and dtype of x");
  const auto gradient = [&](const Tensor& of, void*& to) {
    Tensor made = empty_like_shape(of, of.scalar_type(), sizes_of(of));
    to = made.data_ptr();
    return made;
  };
  // The plain form has no gains. Their gradients are zero, whatever their shapes are.
  const auto gradient_of_gains = [&](const Tensor& of, void*& to) {
    return residual ? gradient(of, to) : torch::stable::new_zeros(of, sizes_of(of));
  };
  std::tuple results{gradient(x, f.grad_x),
                     gradient(weights, f.grad_weights),
                     gradient(embed_weight, f.grad_embed),
                     gradient(embed_bias, f.grad_bias),
                     gradient_of_gains(norm_weight, f.grad_gains),
                     gradient_of_gains(out_norm_weight, f.grad_out_gain),
                     gradient(out_weight, f.grad_out_weight),
                     gradient(out_bias, f.grad_out_bias)};
  const HopperLaunch launch(x);
  const Tensor scratch = scratch_of(f, true, x, launch);
  launch_field_backward(f, f.x.type, scratch.data_ptr(), launch);
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flowseg_cuda, CUDA, m) {
  m.impl("neural_field", TORCH_BOX(&neural_field));
  m.impl("neural_field_bwd", TORCH_BOX(&neural_field_bwd));
}

}  // namespace flowseg::cuda
