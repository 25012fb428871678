// The number types of tensors, as the bindings pass them.
#pragma once

namespace worldkv {

enum class Dtype : int { kBFloat16 = 0, kFloat16 = 1, kFloat32 = 2 };

}  // namespace worldkv
