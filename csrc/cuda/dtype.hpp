#pragma once

namespace fastlm::cuda {

enum class DType { float32, bfloat16, float16 };

}  // namespace fastlm::cuda
