// What the bindings share: tensors come as addresses, checked before any is read.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace fastlm {

using Address = uintptr_t;

template <class T>
T* pointer(Address address, const char* name) {
    if (address == 0) throw std::invalid_argument(std::string(name) + " has no storage");
    if (address % alignof(T)) throw std::invalid_argument(std::string(name) + " is not aligned to its element size");
    return reinterpret_cast<T*>(address);
}

inline void require(bool holds, const char* message) {
    if (!holds) throw std::invalid_argument(message);
}

}  // namespace fastlm
