// Storage types of the rows that the operators read and write.
#pragma once

#include <cstdint>

namespace hellm {

enum class DType : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

}  // namespace hellm
