// AMX: tiles of 16 rows of 64 bytes, where the processor has them and the system lets us use them.
#pragma once
#include <cstdint>
#if defined(__AMX_INT8__) && !defined(PLAIN)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define HAS_TILES 1

// Asks the system once a process
inline bool may_use_tiles() {
    static const bool is_permitted = !syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */);
    return is_permitted;
}

// All eight tiles of this thread, whole
inline void configure_tiles() {
    struct {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } const config;
    static_assert(sizeof config == 64, "as the instruction reads it");
    _tile_loadconfig(&config);
}
inline void release_tiles() { _tile_release(); }
#else
inline bool may_use_tiles() { return false; }
inline void configure_tiles() {}
inline void release_tiles() {}
#endif
