// What the bindings of both cores share: tensors come as addresses, checked before any is read.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace fastlm {

using Address = uintptr_t;

template <class T>
T* pointer(Address address, const char* name) {
    if (address == 0) throw std::invalid_argument(std::string(name) + " has no storage");
    if (address % alignof(T)) throw std::invalid_argument(std::string(name) + " is not aligned to its element size");
    return reinterpret_cast<T*>(address);
}

// Null for an address of 0, which stands for a tensor that was not given.
template <class T>
T* optional_pointer(Address address, const char* name) {
    return address ? pointer<T>(address, name) : nullptr;
}

// A copy of `size` numbers, so that what is then checked is what is used, whatever another thread does to the tensor.
template <class Number>
std::vector<Number> copied(Address address, int64_t size, const char* name) {
    if (size == 0) return {};
    const Number* first = pointer<const Number>(address, name);
    return {first, first + size};
}

inline void require(bool holds, const char* message) {
    if (!holds) throw std::invalid_argument(message);
}

}  // namespace fastlm
