#include "tokenizer/word_counter.hpp"

#include <algorithm>
#include <atomic>
#include <exception>
#include <stdexcept>
#include <thread>

namespace fastlm::tokenizer {
namespace {

constexpr size_t kPieceBytes = size_t{1} << 19;         // one thread's unit of work, about 5 ms
constexpr size_t kMostWordBytes = size_t{1} << 24;      // merging one takes some 70 times as much memory
constexpr size_t kParallelFromBytes = size_t{1} << 18;  // below this, starting threads costs more than it saves

uint64_t fold_multiply(uint64_t a, uint64_t b) {
    const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
    return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

uint32_t hash_bytes(std::string_view bytes) {
    constexpr uint64_t kMultiplier = 0x9E3779B97F4A7C15ull;
    const char* p = bytes.data();
    size_t n = bytes.size();
    uint64_t h = 0xD1B54A32D192ED03ull ^ n;
    uint64_t block;
    for (; n >= 8; p += 8, n -= 8) {
        std::memcpy(&block, p, 8);
        h = fold_multiply(h ^ block, kMultiplier);
    }
    block = 0;
    for (size_t i = 0; i < n; ++i) block = (block << 8) | static_cast<unsigned char>(p[i]);
    return static_cast<uint32_t>(fold_multiply(h ^ block, kMultiplier) >> 16);
}

struct Piece {
    std::string_view bytes;
    size_t text;
    size_t offset;
};

// The longest prefix that may be counted apart from the rest; 0 when there is none.
size_t cut_of(std::string_view text, bool by_line) {
    return by_line ? text.rfind('\n') + 1 : last_safe_cut(text);  // npos + 1 is 0
}

std::vector<Piece> split_into_pieces(std::span<const std::string_view> texts, bool by_line) {
    std::vector<Piece> pieces;
    for (size_t t = 0; t < texts.size(); ++t) {
        size_t begin = 0;
        size_t window = kPieceBytes;
        while (begin < texts[t].size()) {
            const std::string_view rest = texts[t].substr(begin);
            const size_t cut = rest.size() <= window ? rest.size() : cut_of(rest.substr(0, window), by_line);
            if (cut == 0) {
                window *= 2;
                continue;
            }
            pieces.push_back({rest.substr(0, cut), t, begin});
            begin += cut;
            window = kPieceBytes;
        }
    }
    return pieces;
}

// Where the units of a thread's work begin in `pieces`, and the end of the last: short texts are counted together.
std::vector<size_t> bounds_of_units(std::span<const Piece> pieces) {
    std::vector<size_t> bounds{0};
    size_t bytes = 0;
    for (size_t i = 0; i < pieces.size(); ++i) {
        bytes += pieces[i].bytes.size();
        if (bytes < kPieceBytes && i + 1 < pieces.size()) continue;
        bounds.push_back(i + 1);
        bytes = 0;
    }
    return bounds;
}

// Runs work(0) … work(n - 1), each on a thread of its own, and rethrows the first exception.
template <class Work>
void run_on_threads(size_t n, Work&& work) {
    std::vector<std::exception_ptr> errors(n);
    auto guarded = [&](size_t i) {
        try {
            work(i);
        } catch (...) {
            errors[i] = std::current_exception();
        }
    };
    std::vector<std::thread> threads;
    for (size_t i = 1; i < n; ++i) threads.emplace_back(guarded, i);
    guarded(0);
    for (std::thread& thread : threads) thread.join();
    for (const std::exception_ptr& error : errors)
        if (error) std::rethrow_exception(error);
}

bool is_continuation(char byte) { return (static_cast<unsigned char>(byte) & 0xC0) == 0x80; }

// Whether the character that starts at `p` (with `n` bytes left) is Unicode White_Space, or cut off.
bool is_space_or_cut_off(const char* p, size_t n) {
    const auto byte = [&](size_t i) { return static_cast<unsigned char>(p[i]); };
    if (n == 0) return true;
    if (byte(0) < 0x80)
        return byte(0) == ' ' || (byte(0) >= '\t' && byte(0) <= '\r') || (byte(0) >= 0x1C && byte(0) < 0x20);
    if (byte(0) == 0xC2) return n < 2 || byte(1) == 0x85 || byte(1) == 0xA0;
    if (n < 3) return byte(0) >= 0xE0 || n < 2;
    if (byte(0) == 0xE1) return byte(1) == 0x9A && byte(2) == 0x80;
    if (byte(0) == 0xE2)
        return (byte(1) == 0x80 && (byte(2) <= 0x8A || byte(2) == 0xA8 || byte(2) == 0xA9 || byte(2) == 0xAF)) ||
               (byte(1) == 0x81 && byte(2) == 0x9F);
    if (byte(0) == 0xE3) return byte(1) == 0x80 && byte(2) == 0x80;
    return false;
}

// An ASCII letter or a Hangul syllable at `p`: enough of \p{L} to find a cut in text without line ends.
bool is_common_letter(const char* p, size_t n) {
    const auto byte = [&](size_t i) { return static_cast<unsigned char>(p[i]); };
    if (n == 0) return false;
    const unsigned char lower = byte(0) | 0x20;
    if (lower >= 'a' && lower <= 'z') return true;
    if (n < 3 || byte(0) < 0xEA || byte(0) > 0xED) return false;
    const unsigned code = ((byte(0) & 0x0Fu) << 12) | ((byte(1) & 0x3Fu) << 6) | (byte(2) & 0x3Fu);
    return code >= 0xAC00 && code <= 0xD7A3;
}

size_t character_before(std::string_view text, size_t end) {
    size_t begin = end - 1;
    while (begin > 0 && end - begin < 4 && is_continuation(text[begin])) --begin;
    return begin;
}

}  // namespace

void WordTable::clear() {
    size_ = 0;
    std::fill(slots_.begin(), slots_.end(), kEmpty);
}

void WordTable::grow() {
    if (size_ >= kEmpty / 2) throw std::length_error("more than 2^31 distinct words");
    slots_.assign(std::max<size_t>(1024, slots_.size() * 2), kEmpty);
    for (uint32_t i = 0; i < size_; ++i) {
        size_t slot = word_at(i).hash & mask();
        while (slots_[slot] != kEmpty) slot = (slot + 1) & mask();
        slots_[slot] = i;
    }
}

const char* Arena::copy(std::string_view bytes) {
    if (bytes.size() > free_) {
        const size_t size = std::max(kBlockBytes, bytes.size());
        blocks_.emplace_back(new char[size]);
        next_ = blocks_.back().get();
        free_ = size;
    }
    char* copied = next_;
    std::memcpy(copied, bytes.data(), bytes.size());
    next_ += bytes.size();
    free_ -= bytes.size();
    memory_ += bytes.size();
    return copied;
}

WordCounter::WordCounter(Pattern pattern, unsigned num_threads, size_t most_bytes)
    : pattern_(pattern),
      scanner_(scanner_from_name("")),
      most_bytes_(most_bytes),
      round_tables_(std::max(1u, num_threads)),
      shards_(kShards) {}

std::optional<InvalidUtf8> WordCounter::add(std::span<const std::string_view> texts, bool by_line) {
    size_t total_bytes = 0;
    for (std::string_view text : texts) {
        // Lengths of words are 32 bits wide.
        if (text.size() > UINT32_MAX) throw std::length_error("one text is longer than 4 GiB");
        total_bytes += text.size();
    }
    const std::vector<Piece> pieces = split_into_pieces(texts, by_line);
    const std::vector<size_t> bounds = bounds_of_units(pieces);
    const size_t num_units = bounds.size() - 1;
    const size_t num_threads = total_bytes < kParallelFromBytes ? 1 : std::min(round_tables_.size(), num_units);

    std::atomic<size_t> next_unit{0};
    std::atomic<uint64_t> num_words{0};
    std::vector<std::optional<InvalidUtf8>> invalid(num_units);
    run_on_threads(num_threads, [&](size_t thread) {
        WordTable& table = round_tables_[thread];
        table.clear();
        uint64_t words = 0;
        for (size_t unit; (unit = next_unit.fetch_add(1)) < num_units;) {
            for (size_t i = bounds[unit]; i < bounds[unit + 1]; ++i) {
                const std::string_view bytes = pieces[i].bytes;
                if (const auto offset = find_invalid_utf8(bytes)) {
                    invalid[unit] = {pieces[i].text, pieces[i].offset + *offset};
                    return;
                }
                for (size_t begin = 0; begin < bytes.size();) {
                    const size_t line_end = by_line ? bytes.find('\n', begin) : std::string_view::npos;
                    const size_t end = line_end == std::string_view::npos ? bytes.size() : line_end + 1;
                    split(pattern_, scanner_, bytes.data() + begin, end - begin, [&](const char* data, size_t length) {
                        if (length > kMostWordBytes) throw std::length_error("a word is longer than 16 MiB");
                        const std::string_view word{data, length};
                        table.add(word, hash_bytes(word), 1, [](std::string_view added) { return added.data(); });
                        ++words;
                    });
                    begin = end;
                }
            }
        }
        num_words += words;
    });
    for (const auto& error : invalid)
        if (error) return error;

    total_bytes_ += total_bytes;
    total_words_ += num_words;
    run_on_threads(num_threads, [&](size_t thread) {
        for (size_t t = 0; t < num_threads; ++t) {
            round_tables_[t].for_each([&](const CountedWord& word) {
                const size_t index = (static_cast<uint64_t>(word.hash) * kShards) >> 32;
                if (index % num_threads != thread) return;
                Shard& shard = shards_[index];
                shard.table.add(word.view(), word.hash, word.count,
                                [&](std::string_view bytes) { return shard.arena.copy(bytes); });
            });
        }
    });
    if (most_bytes_ && memory() > most_bytes_) forget_rarest();
    return std::nullopt;
}

uint64_t WordCounter::distinct_words() const {
    uint64_t total = 0;
    for (const Shard& shard : shards_) total += shard.table.size();
    return total;
}

size_t WordCounter::memory() const {
    size_t total = 0;
    for (const Shard& shard : shards_) total += shard.table.memory() + shard.arena.memory();
    return total;
}

void WordCounter::forget_rarest() {
    constexpr size_t highest_count = 4095;
    std::vector<size_t> bytes_of_count(highest_count + 1);
    size_t total = 0;
    for_each([&](std::string_view word, uint64_t count) {
        const size_t bytes = word.size() + sizeof(CountedWord);
        bytes_of_count[std::min<uint64_t>(count, highest_count)] += bytes;
        total += bytes;
    });
    uint64_t most_forgotten = 0;
    for (size_t freed = 0; freed * 2 < total && most_forgotten < highest_count;) {
        freed += bytes_of_count[++most_forgotten];
    }
    for (Shard& shard : shards_) {
        Shard kept;
        shard.table.for_each([&](const CountedWord& word) {
            if (word.count <= most_forgotten) {
                forgotten_words_ += word.count;
                return;
            }
            kept.table.add(word.view(), word.hash, word.count,
                           [&](std::string_view bytes) { return kept.arena.copy(bytes); });
        });
        shard = std::move(kept);
    }
}

size_t last_safe_cut(std::string_view text) {
    for (size_t cut = text.size(); cut-- > 1;) {
        // "word\nnext": every pattern ends a token with the last of a run of line ends. The line end must be a single
        // one, since GPT-2 splits longer white space by what follows it; o200k continues "\n" with "/".
        if (text[cut - 1] == '\n' && cut >= 2) {
            const size_t before = character_before(text, cut - 1);
            if (!is_space_or_cut_off(&text[before], cut - 1 - before) && text[cut] != '/' &&
                !is_space_or_cut_off(&text[cut], text.size() - cut))
                return cut;
        }
        // "word next": every pattern starts a token with the space.
        if (text[cut] == ' ' && is_common_letter(&text[cut + 1], text.size() - cut - 1)) {
            const size_t before = character_before(text, cut);
            if (is_common_letter(&text[before], cut - before)) return cut;
        }
    }
    return 0;
}

std::optional<size_t> find_invalid_utf8(std::string_view text) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(text.data());
    const size_t n = text.size();
    size_t i = 0;
    while (i < n) {
        const unsigned char lead = bytes[i];
        if (lead < 0x80) {
            uint64_t block;
            while (i + 8 <= n && (std::memcpy(&block, bytes + i, 8), (block & 0x8080808080808080ull) == 0)) i += 8;
            while (i < n && bytes[i] < 0x80) ++i;
            continue;
        }
        // The second byte's range excludes overlong forms, surrogates and code points above U+10FFFF.
        size_t length = 0;
        unsigned char low = 0x80, high = 0xBF;
        if (lead >= 0xC2 && lead <= 0xDF) {
            length = 2;
        } else if (lead >= 0xE0 && lead <= 0xEF) {
            length = 3;
            if (lead == 0xE0) low = 0xA0;
            if (lead == 0xED) high = 0x9F;
        } else if (lead >= 0xF0 && lead <= 0xF4) {
            length = 4;
            if (lead == 0xF0) low = 0x90;
            if (lead == 0xF4) high = 0x8F;
        }
        if (length == 0 || i + length > n || bytes[i + 1] < low || bytes[i + 1] > high) return i;
        for (size_t k = 2; k < length; ++k)
            if ((bytes[i + k] & 0xC0) != 0x80) return i;
        i += length;
    }
    return std::nullopt;
}

}  // namespace fastlm::tokenizer
