// Prints CuTe's layouts as layouts.cpp prints ours. The headers are in the wheel nvidia-cutlass.
#include <cstdio>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

namespace {

using namespace cute;

template <class Layout>
void print_indices(const char* name, const Layout& layout) {
  std::printf("%s", name);
  for (int i = 0; i < static_cast<int>(size(layout)); ++i) std::printf(" %d", static_cast<int>(layout(i)));
  std::puts("");
}

template <class Atom>
void print_tile(const char* name, Atom atom) {
  print_indices(name, as_position_independent_swizzle_layout(tile_to_shape(atom, Shape<_64, _64>{})));
}

}  // namespace

int main() {
  constexpr auto kMajor = GMMA::Major::K;
  using Wide = MMA_Traits<SM90_64x64x16_F32BF16BF16_RS<kMajor, kMajor>>;
  using Half = MMA_Traits<SM90_64x32x16_F32BF16BF16_RS<kMajor, kMajor>>;
  using Narrow = MMA_Traits<SM90_64x16x16_F32BF16BF16_RS<kMajor, kMajor>>;
  print_indices("A", Wide::ALayout{});
  print_indices("D", Wide::CLayout{});
  print_indices("D16", Narrow::CLayout{});
  print_indices("D32", Half::CLayout{});
  print_tile("K", GMMA::Layout_K_SW128_Atom<bfloat16_t>{});
  print_tile("MN", GMMA::Layout_MN_SW128_Atom<bfloat16_t>{});
}
