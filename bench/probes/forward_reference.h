// ---- host
struct Host {
  int patches, depth, columns, per_image;
  std::vector<float> x, weights, table, gains, out_gain, embed, out_weight, out_bias;   // x and weights hold bf16 values
};
static Host make(int patches, int depth, int columns, int per_image, bool big) {
  Host h{patches, depth, columns, per_image};
  auto fill = [](std::vector<float>& v, size_t n, uint32_t seed, float scale, float shift, bool bf) { v.resize(n); for (size_t i = 0; i < n; ++i) { v[i] = shift + scale * noise((uint32_t)i, seed); if (bf) v[i] = rounded(v[i]); } };
  fill(h.x, (size_t)(big ? 0 : patches) * 768, 11, 1, 0, true);
  fill(h.weights, (size_t)(big ? 0 : patches) * depth * 16384, 12, 0.3f, 0.02f, true);
  fill(h.table, 256 * H, 13, 0.5f, 0, false); fill(h.gains, depth * H, 14, 0.2f, 1, false); fill(h.out_gain, H, 15, 0.2f, 1, false);
  fill(h.embed, 3 * H, 16, 0.5f, 0, false); fill(h.out_weight, 3 * H, 17, 0.2f, 0, false); fill(h.out_bias, 3, 18, 0.1f, 0, false);
  return h;
}
// One patch, computed in T. ROUND: with the roundings of the kernel (scaled weights and A operands in bf16).
template <class T, bool ROUND> static void reference(const Host& a, int patch, float* out) {   // out (3, 256)
  auto R = [](T v) { return ROUND ? (T)rounded((float)v) : v; };
  std::vector<T> h(256 * H), u(WIDE), z(WIDE), q(H), w1(H * WIDE), w2(WIDE * H);
  const int image = patch / a.per_image, cell = patch % a.per_image, top = cell / a.columns * 16, left = cell % a.columns * 16;
  const size_t width = a.columns * 16, plane = (size_t)a.per_image * 256;
  for (int i = 0; i < 256; ++i) for (int j = 0; j < H; ++j) {
    T v = a.table[i * H + j];
    for (int c = 0; c < 3; ++c) v += (T)a.x[(image * 3 + c) * plane + (top + i / 16) * width + left + i % 16] * (T)a.embed[c * H + j];
    h[i * H + j] = v;
  }
  for (int l = 0; l < a.depth; ++l) {
    const float* w = &a.weights[((size_t)patch * a.depth + l) * 16384];
    for (int n = 0; n < WIDE; ++n) { double s = 0; for (int k = 0; k < H; ++k) s += (double)w[k * WIDE + n] * w[k * WIDE + n]; const T f = 1 / std::sqrt(std::max(s, 1e-24)); for (int k = 0; k < H; ++k) w1[k * WIDE + n] = R((T)0.5 * f * (T)w[k * WIDE + n] * (T)a.gains[l * H + k]); }
    for (int n = 0; n < H; ++n) { double s = 0; for (int k = 0; k < WIDE; ++k) s += (double)w[8192 + k * H + n] * w[8192 + k * H + n]; const T f = 1 / std::sqrt(std::max(s, 1e-24)); for (int k = 0; k < WIDE; ++k) w2[k * H + n] = R(f * (T)w[8192 + k * H + n]); }
    for (int i = 0; i < 256; ++i) {
      T* r = &h[i * H]; T s = 0; for (int j = 0; j < H; ++j) s += r[j] * r[j];
      const T n = 1 / std::sqrt(s / H + (T)1e-6);
      for (int j = 0; j < H; ++j) q[j] = R(r[j] * n);
      std::fill(z.begin(), z.end(), T(0));
      for (int k = 0; k < H; ++k) { const T e = q[k]; const T* p = &w1[k * WIDE]; for (int j = 0; j < WIDE; ++j) z[j] += e * p[j]; }
      for (int j = 0; j < WIDE; ++j) u[j] = R(z[j] * (1 + (ROUND ? (T)tanhf((float)z[j]) : (T)std::tanh(z[j]))));
      for (int k = 0; k < WIDE; ++k) { const T e = u[k]; const T* p = &w2[k * H]; for (int j = 0; j < H; ++j) r[j] += e * p[j]; }
    }
  }
  for (int i = 0; i < 256; ++i) {
    const T* r = &h[i * H]; T s = 0; for (int j = 0; j < H; ++j) s += r[j] * r[j];
    const T n = 1 / std::sqrt(s / H + (T)1e-6);
    for (int c = 0; c < 3; ++c) { T v = a.out_bias[c]; for (int j = 0; j < H; ++j) v += r[j] * n * (T)a.out_gain[j] * (T)a.out_weight[c * H + j]; out[c * 256 + i] = v; }
  }
}
template <class T, bool ROUND> static std::vector<float> reference_all(const Host& a) {   // (patches, 3, 256)
  std::vector<float> out((size_t)a.patches * 768);
  const int n = std::min(16u, std::max(1u, std::thread::hardware_concurrency()));
  std::vector<std::thread> ts;
  for (int i = 0; i < n; ++i) ts.emplace_back([&, i] { for (int p = i; p < a.patches; p += n) reference<T, ROUND>(a, p, &out[(size_t)p * 768]); });
  for (auto& t : ts) t.join();
  return out;
}
