// The kernel ABI: one signature for every kernel, so that a plan is an array (docs/formats.md).
#pragma once

#include <stddef.h>
#include <stdint.h>

typedef union {
    void *p;
    int64_t i;
    double f;
} Arg;

typedef struct {
    void (*fn)(const Arg *);
    const Arg *args;
} Launch;

#define DC_EXPORT extern "C" __attribute__((visibility("default")))

template <class T> static inline T *ptr(const Arg &a) { return static_cast<T *>(a.p); }
