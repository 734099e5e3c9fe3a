// ---- host
struct Host { int items, grid; std::vector<float> w, n, g, r; };
static Host make(int items, int grid) {
  Host h{items, grid}; h.w.resize((size_t)items * 16384); h.n.resize(256 * H); h.g.resize(256 * H); h.r.resize(256);
  for (size_t i = 0; i < h.w.size(); ++i) h.w[i] = rounded((i % 16384 < 8192 ? 0.0625f : 0.088f) * noise((uint32_t)i, 21));   // W1 scaled by half the inverse length, W2 by the inverse length
  for (int i = 0; i < 256 * H; ++i) { h.n[i] = rounded(noise(i, 22)); h.g[i] = rounded(noise(i, 23)); }
  for (int i = 0; i < 256; ++i) h.r[i] = 0.3f + 0.001f * i;
  return h;
}
// Results of one thread block: dw (steps, [dW1 (hx, inner), dW2 (inner, hx)]) and the last g. ROUND: u, dz and g are rounded to bf16.
template <bool ROUND> static void reference(const Host& h, int block, std::vector<float>& dw, std::vector<float>& gl) {
  auto R = [](double v) { return ROUND ? (double)rounded((float)v) : v; };
  std::vector<double> g(h.g.begin(), h.g.end()), u(256 * 128), dz(256 * 128), next(256 * H);
  for (int item = block; item < h.items; item += h.grid) {
    const float *w1 = &h.w[(size_t)item * 16384], *w2 = w1 + 8192;
    for (int p = 0; p < 256; ++p) for (int j = 0; j < 128; ++j) {
      double y = 0, du = 0;
      for (int k = 0; k < H; ++k) { y += (double)h.n[p * H + k] * w1[k * 128 + j]; du += g[p * H + k] * w2[j * H + k]; }
      const double t = std::tanh(y), uu = y * (1 + t);
      u[p * 128 + j] = R(uu); dz[p * 128 + j] = R(du * (1 + t + uu * (1 - t)));
    }
    std::vector<double> d1(8192, 0.0), d2(8192, 0.0);
    for (int p = 0; p < 256; ++p) {
      for (int k = 0; k < H; ++k) for (int j = 0; j < 128; ++j) d1[k * 128 + j] += (double)h.n[p * H + k] * dz[p * 128 + j];
      for (int j = 0; j < 128; ++j) for (int k = 0; k < H; ++k) d2[j * H + k] += u[p * 128 + j] * g[p * H + k];
      double dn[H], along = 0;
      for (int k = 0; k < H; ++k) { dn[k] = 0; for (int j = 0; j < 128; ++j) dn[k] += dz[p * 128 + j] * w1[k * 128 + j]; along += dn[k] * h.n[p * H + k]; }
      for (int k = 0; k < H; ++k) next[p * H + k] = R(g[p * H + k] + h.r[p] * (dn[k] - h.n[p * H + k] * along / H));
    }
    g = next;
    for (double v : d1) dw.push_back(v);
    for (double v : d2) dw.push_back(v);
  }
  gl.assign(g.begin(), g.end());
}
static __nv_bfloat16* up16(const std::vector<float>& v) { std::vector<__nv_bfloat16> b(v.size()); for (size_t i = 0; i < v.size(); ++i) b[i] = __float2bfloat16(v[i]); return up(b); }
