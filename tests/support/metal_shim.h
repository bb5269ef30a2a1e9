// Metal's names for a C++ compiler. One thread steps the lanes of a threadgroup from stop to stop
// (barriers and sums over a simdgroup), which all lanes must reach in the same order.
#define _XOPEN_SOURCE 700
#include <stddef.h>
#include <stdint.h>
#include <ucontext.h>

inline float sqrt(float x) { return __builtin_sqrtf(x); }  // without headers: compiles sooner

template <typename To, typename From>
To bits(From from) {
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

struct half {
  uint16_t code;
  half() = default;
  explicit half(float value) {
    uint32_t x = bits<uint32_t>(value), sign = x >> 16 & 0x8000;
    x &= 0x7fffffff;
    if (x > 0x7f800000) code = 0x7e00;
    else if (x >= 0x47800000) code = 0x7c00;
    else if (x < 0x38800000) code = uint16_t(__builtin_nearbyintf(__builtin_fabsf(value) * 16777216.0f));
    else code = uint16_t((x - 0x38000000 + 0xfff + (x >> 13 & 1)) >> 13);
    code |= sign;
  }
  operator float() const {
    uint32_t exponent = code >> 10 & 31, fraction = code & 1023;
    float size = exponent == 31 ? (fraction ? __builtin_nanf("") : __builtin_inff())
               : exponent       ? __builtin_ldexpf(1024.0f + fraction, int(exponent) - 25)
                                : __builtin_ldexpf(float(fraction), -24);
    return code & 0x8000 ? -size : size;
  }
};

struct bfloat16_t {
  uint16_t code;
  bfloat16_t() = default;
  explicit bfloat16_t(float value) {
    uint32_t x = bits<uint32_t>(value);
    code = value != value ? 0x7fc0 : uint16_t((x + 0x7fff + (x >> 16 & 1)) >> 16);
  }
  operator float() const { return bits<float>(uint32_t(code) << 16); }
};

struct uint3 { unsigned x, y, z; };
enum class mem_flags { mem_threadgroup };
enum class Stop { barrier, sum, end };

struct Lane {
  ucontext_t context;
  char stack[16384];
  Stop stop;
  float value;
};

static Lane lanes[1024];
static Lane* current;
static ucontext_t scheduler;
static uint3 thread_position_in_threadgroup, threadgroup_position_in_grid;
static void body();  // of the kernel, with its arguments

static void stop_at(Stop stop) {
  current->stop = stop;
  swapcontext(&current->context, &scheduler);
}

static void threadgroup_barrier(mem_flags) { stop_at(Stop::barrier); }

static float simd_sum(float value) {
  current->value = value;
  stop_at(Stop::sum);
  return current->value;
}

static void run_lane() {
  body();
  current->stop = Stop::end;
}

// Returns whether all lanes came to the same stops. `backwards` steps the last lane first, so that
// a missing barrier shows in one of the two orders.
static bool run_threadgroup(int count, bool backwards) {
  for (int n = 0; n < count; n++) {
    ucontext_t& context = lanes[n].context;
    getcontext(&context);
    context.uc_stack.ss_sp = lanes[n].stack;
    context.uc_stack.ss_size = sizeof(lanes[n].stack);
    context.uc_link = &scheduler;
    makecontext(&context, run_lane, 0);
  }
  while (true) {
    for (int n = 0; n < count; n++) {
      thread_position_in_threadgroup.x = backwards ? count - 1 - n : n;
      current = &lanes[thread_position_in_threadgroup.x];
      swapcontext(&scheduler, &current->context);
    }
    for (int n = 0; n < count; n++)
      if (lanes[n].stop != lanes[0].stop) return false;
    if (lanes[0].stop == Stop::end) return true;
    if (lanes[0].stop == Stop::sum)
      for (int first = 0; first < count; first += 32) {
        float total = 0;
        for (int n = first; n < first + 32; n++) total += lanes[n].value;
        for (int n = first; n < first + 32; n++) lanes[n].value = total;
      }
  }
}

static void** arrays;

extern "C" bool run(void** arguments, int groups, int count, bool backwards) {
  arrays = arguments;
  for (int group = 0; group < groups; group++) {
    threadgroup_position_in_grid.x = group;
    if (!run_threadgroup(count, backwards)) return false;
  }
  return true;
}

#define threadgroup static
