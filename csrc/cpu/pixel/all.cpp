// Compiles the kernels of all pixel ops as one translation unit. The compiler then emits shared code, such as load, store and
// correct_block, once: separate translation units would have twice as many instructions.
#include "cpu/pixel/flow_interpolate.cpp"
#include "cpu/pixel/distance_correction.cpp"
#include "cpu/pixel/flow_loss.cpp"
#include "cpu/pixel/nearest_centroid.cpp"
#include "cpu/pixel/decode_confusion.cpp"
#include "cpu/pixel/class_probabilities.cpp"
#include "cpu/pixel/top_classes.cpp"
