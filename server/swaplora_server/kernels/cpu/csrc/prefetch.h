// Memory that is read soon after a call, asked for while the call computes.
#pragma once
#include <algorithm>
#include "abi.h"

constexpr int64_t LINE = 64;  // bytes

inline int64_t lines_of(const Span& span) { return (span.bytes + LINE - 1) / LINE; }

// A piece's share of the spans, prefetched line by line.
struct Prefetch {
    const Span* span;
    int64_t line, left;  // of the span, and of all

    // lines [from, to) of all
    Prefetch(const Span* spans, int64_t from, int64_t to) : span(spans), line(from), left(to - from) {}

    // The start of up to `*count` lines that follow one another, which is set to their number
    const char* take(int64_t* count) {
        while (left && line >= lines_of(*span)) line -= lines_of(*span++);
        *count = left ? std::min({*count, left, lines_of(*span) - line}) : 0;
        const char* start = *count ? static_cast<const char*>(span->start) + line * LINE : nullptr;
        line += *count, left -= *count;
        return start;
    }

    void take_all() {
        for (int64_t count = left; const char* start = take(&count); count = left)
            for (; count; count--, start += LINE) __builtin_prefetch(start, 0, 2);
    }
};
