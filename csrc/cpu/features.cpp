#include "cpu/features.hpp"

#include <cstdlib>
#include <cstring>

namespace fastlm::cpu {

static Features detect() {
    Features f;
    const char* limit = std::getenv("FASTLM_CPU_FEATURES");
    if (limit && std::strcmp(limit, "none") == 0) return f;
#if defined(__x86_64__)
    __builtin_cpu_init();
    f.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (limit && std::strcmp(limit, "avx2") == 0) return f;
    f.avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    f.avx512_vnni = f.avx512 && __builtin_cpu_supports("avx512vnni");
    f.avx512_bf16 = f.avx512 && __builtin_cpu_supports("avx512bf16");
#elif defined(__aarch64__)
    f.neon = true;
#endif
    return f;
}

const Features& features() {
    static const Features detected = detect();
    return detected;
}

}  // namespace fastlm::cpu
