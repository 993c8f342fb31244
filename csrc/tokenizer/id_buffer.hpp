// Growing array of ids. Whoever knows how many are to come makes room once and writes them unchecked.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>

namespace fastlm::tokenizer {

class IdBuffer {
public:
    uint32_t* data() { return data_.get(); }
    const uint32_t* data() const { return data_.get(); }
    size_t size() const { return size_; }
    void reserve(size_t more) {
        if (capacity_ - size_ < more) grow(more);
    }
    uint32_t* end() { return data_.get() + size_; }
    void advance(size_t count) { size_ += count; }
    void set_end(const uint32_t* end) { size_ = static_cast<size_t>(end - data_.get()); }
    void truncate(size_t size) { size_ = size; }
    void push(uint32_t id) {
        reserve(1);
        data_[size_++] = id;
    }
    void append(const uint32_t* ids, size_t count) {
        reserve(count);
        std::memcpy(end(), ids, count * sizeof(uint32_t));
        size_ += count;
    }

private:
    void grow(size_t more) {
        const size_t capacity = std::max(size_ + more, capacity_ * 2);
        std::unique_ptr<uint32_t[]> data(new uint32_t[capacity]);
        if (size_) std::memcpy(data.get(), data_.get(), size_ * sizeof(uint32_t));
        data_ = std::move(data);
        capacity_ = capacity;
    }

    std::unique_ptr<uint32_t[]> data_;
    size_t size_ = 0;
    size_t capacity_ = 0;
};

}  // namespace fastlm::tokenizer
