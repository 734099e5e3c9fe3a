// From run-time types and channels to the kernels that were compiled.
#pragma once

#include "cuda/arguments.h"

namespace flowseg::cuda {

// Calls body.template operator()<T, C>() with the compute type and the smallest compiled number of channels that is enough: padding
// with zeros changes no distance. FLOWSEG_ONLY_3: tests of the machine code compile the common case alone.
template <class Body>
void for_type_and_channels([[maybe_unused]] Real type, [[maybe_unused]] int channels, Body body) {
#ifdef FLOWSEG_ONLY_3
  return body.template operator()<float, 3>();
#else
  if (type == Real::f64) {
    return channels <= 4 ? body.template operator()<double, 4>() : body.template operator()<double, 16>();
  }
  if (channels <= 3) return body.template operator()<float, 3>();
  if (channels <= 4) return body.template operator()<float, 4>();
  if (channels <= 8) return body.template operator()<float, 8>();
  return body.template operator()<float, 16>();
#endif
}

template <class Body>
void for_type([[maybe_unused]] Real type, Body body) {
#ifndef FLOWSEG_ONLY_3
  if (type == Real::f64) return body.template operator()<double>();
#endif
  body.template operator()<float>();
}

}  // namespace flowseg::cuda
