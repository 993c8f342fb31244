// Which instruction sets the running processor has. One binary serves every x86-64 and Arm machine: kernels carry
// per-function target attributes and choose at run time by these flags. FASTLM_CPU_FEATURES=avx2 or none in the
// environment leaves the later ones, or all, unused, so that a machine can run what older ones would.
#pragma once

namespace fastlm::cpu {

struct Features {
    bool avx2 = false;         // with FMA
    bool avx512 = false;       // F, BW, DQ and VL together
    bool avx512_vnni = false;
    bool avx512_bf16 = false;
    bool neon = false;
};

const Features& features();

}  // namespace fastlm::cpu
