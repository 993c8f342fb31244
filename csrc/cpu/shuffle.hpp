// Constant shuffles of two vectors by the compilers' own built-in; `type` is the integer vector of that size.
#pragma once

#if __has_builtin(__builtin_shufflevector)
#define FASTLM_JOINS_VECTORS 1  // the result may be of another size than the operands
#define FASTLM_SHUFFLE(type, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else  // GCC 11 and older
#define FASTLM_SHUFFLE(type, a, b, ...) __builtin_shuffle(a, b, (type){__VA_ARGS__})
#endif
