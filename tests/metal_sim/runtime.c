// Runs a kernel that was compiled for the CPU: one fiber per GPU thread, SIMD-groups in lockstep at
// their collective operations, barriers, and shadow memory behind the compiler's sanitizer
// callbacks.
//
// The kernel's object calls __sim_* (from include/), __tsan_* (from -fsanitize=thread, compile
// only) and __ubsan_* (from -fsanitize=signed-integer-overflow,...). No sanitizer library is
// linked: what these callbacks mean here is what a GPU would do. The host side, launch.py, calls
// sim_*.
//
// All fibers run on the calling OS thread, one at a time, so nothing here needs a lock.

#define _GNU_SOURCE
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

enum {
  SIMD_WIDTH = 32,
  MAX_THREADS = 1024,
  MAX_SIMDGROUPS = MAX_THREADS / SIMD_WIDTH,
  MAX_REGIONS = 64,
  MAX_DEPTH = 64,
  THREADGROUP_LIMIT = 32768,
  RED_ZONE = 256,
  STEPS_BETWEEN_LOOKS_AT_THE_CLOCK = 1 << 16,
};
static const size_t STACK_SIZE = 256 << 10;
static const size_t ARENA_SIZE = 256 << 10;
static const size_t GAP = 1 << 20;
static const size_t PAGE = 64 << 10; // the largest that Linux has on these processors

// ---- Where something happened -------------------------------------------------------------------

// Any of them may be 0, unknown. `pc` is an offset into the kernel's object, `line` one of the
// kernel's text, `statement` the number of the last statement that the thread began.
struct place {
  uint32_t pc, line, statement;
};

struct fault {
  const char *kind;
  struct place place;
  char text[2048];
};

// ---- Threads ------------------------------------------------------------------------------------

enum state { READY, AT_COLLECTIVE, AT_BARRIER, DONE };

// A helper that uses a collective may be called from two branches: the chain of callers is part of
// what "the same operation" means.
struct frame {
  uint32_t chain, statement;
};

struct lane {
  void *stack_pointer;
  char *stack;
  enum state state;
  const char *operation;
  uint32_t site, pc, chain, statement;
  uint32_t flags;
  const void *value;
  uint32_t value_size;
  uint32_t depth;
  struct frame frames[MAX_DEPTH];
};

// What the lanes of a SIMD-group exchange; include/sim/simd.h knows this layout.
struct slots {
  uint32_t active, done, lane, unused;
  uint64_t data[SIMD_WIDTH][8];
  uint64_t result[8];
};

// The values of the attribute parameters of one thread; build.py knows this layout.
struct positions {
  uint32_t threads_per_grid[3];
  uint32_t thread_position_in_grid[3];
  uint32_t thread_position_in_threadgroup[3];
  uint32_t threadgroup_position_in_grid[3];
  uint32_t threadgroups_per_grid[3];
  uint32_t threads_per_threadgroup[3];
  uint32_t dispatch_threads_per_threadgroup[3];
  uint32_t thread_index_in_threadgroup;
  uint32_t thread_index_in_simdgroup;
  uint32_t simdgroup_index_in_threadgroup;
  uint32_t simdgroups_per_threadgroup;
};

// ---- Memory -------------------------------------------------------------------------------------

enum scope { NOBODY, ONE_THREAD, ONE_SIMDGROUP, ONE_THREADGROUP, SEVERAL_THREADGROUPS };

// The accesses to a cell that a later one may race with: the last of them, and how widely they
// spread.
struct record {
  uint32_t group, clock, pc;
  uint16_t thread;
  uint8_t scope, atomic;
};

struct cell {
  struct record write, read;
};

enum space { DEVICE_MEMORY, THREADGROUP_MEMORY, SPACES };
enum { READ_ONLY = 1, INITIALISED = 2, UNCHECKED = 4, BORROWED = 8 };
enum { READS = 1, WRITES = 2, ATOMIC = 4 };

struct region {
  char name[64];
  char *base;
  size_t size;
  uint32_t element, granule;
  uint32_t flags, skew;
  enum space space;
  struct cell *shadow;
};

typedef void (*entry_function)(const uint64_t *arguments, const struct positions *positions);

// ---- State of a run -----------------------------------------------------------------------------

static struct lane lanes[MAX_THREADS];
static struct positions positions[MAX_THREADS];
static struct slots slots[MAX_SIMDGROUPS];
static uint32_t lane_order[SIMD_WIDTH], simdgroup_order[MAX_SIMDGROUPS];
static char *stacks;
static void *scheduler_stack_pointer;
static uint32_t thread_count, current;

static entry_function entry;
static const uint64_t *arguments;
static uint32_t groups[3], group, group_count;

static struct region buffers[MAX_REGIONS], variables[MAX_REGIONS];
static uint32_t buffer_count, variable_count;
static char *arena;
static struct cell *arena_shadow;
static size_t arena_used, threadgroup_bytes;
static char *object_start, *object_end;

// One clock for everything: it ticks at every synchronisation and never goes back. An access is
// ordered before everything that its threadgroup does after a barrier that ticked later.
static uint32_t now = 1, group_start;
static uint32_t barrier_clock[SPACES], simdgroup_clock[SPACES][MAX_SIMDGROUPS];

static bool checked, failed;
static struct fault fault_found;
static uint8_t *statements_run;
static uint32_t statement_count;
static uint64_t steps, accesses, switches, collectives;
static double deadline, time_limit;
static enum order { FORWARD, REVERSE, SHUFFLED } order;
static uint32_t random_state;

// ---- Fibers -------------------------------------------------------------------------------------

// Saves the callee-saved registers on the stack, stores the stack pointer, and takes up the other
// stack.
__attribute__((naked, noinline)) static void switch_stack(void **save, void *to) {
#if defined(__x86_64__)
  __asm__("push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
          "mov %rsp, (%rdi)\n mov %rsi, %rsp\n"
          "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret");
#elif defined(__aarch64__)
  __asm__("sub sp, sp, #160\n"
          "stp x19, x20, [sp]\n stp x21, x22, [sp, #16]\n stp x23, x24, [sp, #32]\n"
          "stp x25, x26, [sp, #48]\n stp x27, x28, [sp, #64]\n stp x29, x30, [sp, #80]\n"
          "stp d8, d9, [sp, #96]\n stp d10, d11, [sp, #112]\n"
          "stp d12, d13, [sp, #128]\n stp d14, d15, [sp, #144]\n"
          "mov x9, sp\n str x9, [x0]\n mov sp, x1\n"
          "ldp x19, x20, [sp]\n ldp x21, x22, [sp, #16]\n ldp x23, x24, [sp, #32]\n"
          "ldp x25, x26, [sp, #48]\n ldp x27, x28, [sp, #64]\n ldp x29, x30, [sp, #80]\n"
          "ldp d8, d9, [sp, #96]\n ldp d10, d11, [sp, #112]\n"
          "ldp d12, d13, [sp, #128]\n ldp d14, d15, [sp, #144]\n"
          "add sp, sp, #160\n ret");
#else
#error "The simulator switches stacks on x86-64 and aarch64 only"
#endif
}

static void to_scheduler(void) {
  switches++;
  switch_stack(&lanes[current].stack_pointer, scheduler_stack_pointer);
}

static void resume(uint32_t thread) {
  current = thread;
  switches++;
  switch_stack(&scheduler_stack_pointer, lanes[thread].stack_pointer);
}

static void fiber_main(void) {
  entry(arguments, &positions[current]);
  lanes[current].state = DONE;
  for (;;) to_scheduler();
}

static void start_fiber(uint32_t thread) {
  struct lane *lane = &lanes[thread];
  uint64_t *top = (uint64_t *)(lane->stack + STACK_SIZE);
#if defined(__x86_64__)
  *--top = 0; // the ABI's alignment: fiber_main starts as if it had been called
  *--top = (uint64_t)fiber_main;
  for (int i = 0; i < 6; i++) *--top = 0;
#else
  top -= 20;
  memset(top, 0, 160);
  top[11] = (uint64_t)fiber_main; // x30
#endif
  lane->stack_pointer = top;
  lane->state = READY;
  lane->depth = lane->chain = lane->statement = 0;
}

// ---- Faults -------------------------------------------------------------------------------------

static uint32_t object_offset(const void *pc) {
  const char *at = pc;
  return at >= object_start && at < object_end ? (uint32_t)(at - object_start) : 0;
}

static struct place place_of(const struct lane *lane) {
  return (struct place){lane->pc, lane->site >> 12, lane->statement};
}

static struct place here(uint32_t pc, uint32_t line) {
  return (struct place){pc, line, lanes[current].statement};
}

// launch.py turns <<...>> into file:line.
static const char *write_place(char *text, size_t size, struct place place) {
  snprintf(text, size, "<<%u %u %u>>", place.pc, place.line, place.statement);
  return text;
}

static void write_thread(char *text, size_t size, uint32_t in_group, uint32_t thread) {
  snprintf(
      text, size, "thread %u of threadgroup (%u, %u, %u)", thread, in_group % groups[0],
      in_group / groups[0] % groups[1], in_group / groups[0] / groups[1]);
}

static void note_fault(const char *kind, struct place place, const char *format, va_list list) {
  if (failed) return;
  failed = true;
  fault_found.kind = kind;
  fault_found.place = place;
  vsnprintf(fault_found.text, sizeof fault_found.text, format, list);
}

// For the scheduler, whose run ends then.
__attribute__((format(printf, 3, 4))) static void
report(const char *kind, struct place place, const char *format, ...) {
  va_list list;
  va_start(list, format);
  note_fault(kind, place, format, list);
  va_end(list);
}

// For a thread, which never goes on.
__attribute__((format(printf, 3, 4), noreturn)) static void
stop(const char *kind, struct place place, const char *format, ...) {
  va_list list;
  va_start(list, format);
  note_fault(kind, place, format, list);
  va_end(list);
  lanes[current].state = DONE;
  to_scheduler();
  abort();
}

// ---- Watchdog and statements --------------------------------------------------------------------

static double seconds(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

// Every statement and every access of a kernel is a step, so even an empty loop gets here.
static inline void step(uint32_t pc) {
  if (++steps % STEPS_BETWEEN_LOOKS_AT_THE_CLOCK || seconds() < deadline) return;
  stop("hang", here(pc, 0), "the kernel was still running after %g s", time_limit);
}

void __sim_statement(uint32_t number) {
  lanes[current].statement = number;
  if (number < statement_count) statements_run[number] = 1;
  step(0);
}

void __tsan_func_entry(void *caller) {
  struct lane *lane = &lanes[current];
  if (lane->depth == MAX_DEPTH) stop("hang", here(0, 0), "more than %d nested calls", MAX_DEPTH);
  lane->frames[lane->depth++] = (struct frame){lane->chain, lane->statement};
  lane->chain = lane->chain * 31 + object_offset(caller);
}

void __tsan_func_exit(void) {
  struct lane *lane = &lanes[current];
  if (!lane->depth) return;
  struct frame frame = lane->frames[--lane->depth];
  lane->chain = frame.chain;
  // The end of the kernel itself says nothing new; the end of a helper leads back to its caller.
  if (lane->depth) lane->statement = frame.statement;
}

void __tsan_init(void) {}

// ---- Threadgroup variables ----------------------------------------------------------------------

static uint32_t granule_of(uint32_t element) {
  return element % 4 == 0 ? 4 : element % 2 == 0 ? 2 : 1;
}

// Every thread comes here when it meets the declaration; the first one makes the variable.
uint64_t __sim_threadgroup(const char *name, uint32_t size, uint32_t element, uint32_t site) {
  for (uint32_t i = 0; i < variable_count; i++)
    if (!strcmp(variables[i].name, name)) return (uint64_t)variables[i].base;
  threadgroup_bytes += (size + 15) / 16 * 16;
  if (threadgroup_bytes > THREADGROUP_LIMIT || variable_count == MAX_REGIONS)
    stop(
        "threadgroup memory", here(0, site >> 12),
        "%zu bytes of threadgroup memory exceed the limit of %d bytes", threadgroup_bytes,
        THREADGROUP_LIMIT);
  struct region *variable = &variables[variable_count++];
  snprintf(variable->name, sizeof variable->name, "%s", name);
  variable->base = arena + arena_used;
  variable->size = size;
  variable->element = element;
  variable->granule = granule_of(element);
  variable->flags = 0;
  variable->space = THREADGROUP_MEMORY;
  variable->shadow = arena_shadow + arena_used;
  arena_used += (size + RED_ZONE + 63) / 64 * 64;
  memset(variable->base, 0xff, size);
  return (uint64_t)variable->base;
}

static void forget_variables(void) {
  if (arena_shadow) memset(arena_shadow, 0, arena_used * sizeof(struct cell));
  variable_count = 0;
  arena_used = threadgroup_bytes = 0;
}

// The name that the compiler gives is "name#number": two variables of one name are two.
static int name_length(const struct region *region) {
  return (int)strcspn(region->name, "#");
}

// ---- Races --------------------------------------------------------------------------------------

static uint32_t simdgroup(uint32_t thread) {
  return thread / SIMD_WIDTH;
}

// Did all accesses in the record happen before whatever the current thread does now?
static bool ordered(const struct record *record, enum space space) {
  if (record->scope == NOBODY) return true;
  if (record->scope == SEVERAL_THREADGROUPS || record->group != group) return false;
  if (record->scope == ONE_THREAD && record->thread == current) return true;
  if (record->clock < barrier_clock[space]) return true;
  uint32_t mine = simdgroup(current);
  return record->scope <= ONE_SIMDGROUP && simdgroup(record->thread) == mine &&
         record->clock < simdgroup_clock[space][mine];
}

// Adds the current thread's access. What is ordered before it can be forgotten: whoever comes after
// this access comes after that too.
static void add_access(struct record *record, enum space space, bool atomic, uint32_t pc) {
  uint8_t scope = ONE_THREAD;
  if (!ordered(record, space)) {
    uint8_t distance = record->group != group                            ? SEVERAL_THREADGROUPS
                       : simdgroup(record->thread) != simdgroup(current) ? ONE_THREADGROUP
                                                                         : ONE_SIMDGROUP;
    scope = distance > record->scope ? distance : record->scope;
    atomic = atomic && record->atomic;
  }
  *record = (struct record){group, now, pc, (uint16_t)current, scope, atomic};
}

__attribute__((noreturn)) static void stop_for_race(
    const struct region *region, size_t offset, const struct record *record, const char *theirs,
    const char *ours, uint32_t pc, uint32_t line) {
  char me[80], them[80], place[64];
  write_thread(me, sizeof me, group, current);
  write_thread(them, sizeof them, record->group, record->thread);
  stop(
      "race", here(pc, line),
      "%s of '%.*s' element %zu by %s, unsynchronised with a%s %s at %s by %s%s", ours,
      name_length(region), region->name, offset / region->element, me,
      record->atomic ? "n atomic" : "", theirs,
      write_place(place, sizeof place, (struct place){record->pc, 0, 0}), them,
      record->scope > ONE_THREAD ? " and others" : "");
}

static void
access_cell(struct region *region, size_t number, uint32_t access, uint32_t pc, uint32_t line) {
  struct cell *cell = &region->shadow[number];
  enum space space = region->space;
  size_t offset = number * region->granule;
  bool atomic = access & ATOMIC;
  if (space == THREADGROUP_MEMORY) { // a new threadgroup finds nothing of the one before it
    if (cell->write.clock < group_start) cell->write.scope = NOBODY;
    if (cell->read.clock < group_start) cell->read.scope = NOBODY;
  }
  if (access & READS && cell->write.scope == NOBODY && !(region->flags & INITIALISED))
    stop(
        "uninitialised", here(pc, line),
        "read of '%.*s' element %zu, which nothing has written yet", name_length(region),
        region->name, offset / region->element);
  const char *ours = access & WRITES ? "write" : "read";
  if (!(atomic && cell->write.atomic) && !ordered(&cell->write, space))
    stop_for_race(region, offset, &cell->write, "write", ours, pc, line);
  if (!(access & WRITES)) {
    add_access(&cell->read, space, atomic, pc);
    return;
  }
  if (ordered(&cell->read, space))
    cell->read.scope = NOBODY;
  else if (!(atomic && cell->read.atomic))
    stop_for_race(region, offset, &cell->read, "read", ours, pc, line);
  add_access(&cell->write, space, atomic, pc);
}

// ---- Accesses -----------------------------------------------------------------------------------

static bool inside(const char *address, size_t size, const char *start, size_t room) {
  return address >= start && size <= room && (size_t)(address - start) <= room - size;
}

static struct region *
find(struct region *regions, uint32_t count, const char *address, size_t size) {
  for (uint32_t i = 0; i < count; i++)
    if (inside(address, size, regions[i].base, regions[i].size)) return &regions[i];
  return NULL;
}

// The region that an out-of-bounds access was most likely meant for.
static struct region *nearest(struct region *regions, uint32_t count, const char *address) {
  struct region *best = NULL;
  uint64_t best_distance = UINT64_MAX;
  for (uint32_t i = 0; i < count; i++) {
    int64_t from_start = address - regions[i].base;
    uint64_t distance =
        from_start < 0 ? (uint64_t)-from_start : (uint64_t)from_start - regions[i].size;
    if (distance < best_distance) best = &regions[i], best_distance = distance;
  }
  return best;
}

__attribute__((noreturn)) static void
stop_for_bounds(const char *address, size_t size, uint32_t access, uint32_t pc, uint32_t line) {
  bool local = inside(address, 0, arena, ARENA_SIZE);
  struct region *region =
      local ? nearest(variables, variable_count, address) : nearest(buffers, buffer_count, address);
  const char *what = access & WRITES ? "write" : "read";
  int64_t offset = region ? address - region->base : 0;
  if (!region || offset < -(int64_t)GAP || offset > (int64_t)(region->size + GAP))
    stop("bounds", here(pc, line), "%s of %zu bytes far from all buffers", what, size);
  int64_t element = region->element;
  int64_t index = (offset - (offset < 0 ? element - 1 : 0)) / element;
  stop(
      "bounds", here(pc, line), "%s of %zu bytes at element %lld of '%.*s', which has %zu", what,
      size, (long long)index, name_length(region), region->name, region->size / region->element);
}

static void
access_memory(const char *address, size_t size, uint32_t access, uint32_t pc, uint32_t line) {
  if (inside(address, size, stacks, STACK_SIZE * MAX_THREADS)) return; // the thread's own
  accesses++;
  step(pc);
  struct region *region = inside(address, size, arena, ARENA_SIZE)
                              ? find(variables, variable_count, address, size)
                              : find(buffers, buffer_count, address, size);
  if (!region) {
    bool constants = !(access & WRITES) && address >= object_start && address < object_end;
    if (constants) return;
    stop_for_bounds(address, size, access, pc, line);
  }
  if (access & WRITES && region->flags & READ_ONLY)
    stop(
        "read-only", here(pc, line),
        "write to the input '%s'; declare it with writable= if it is meant", region->name);
  if (!region->shadow) return;
  size_t first = (size_t)(address - region->base) / region->granule;
  size_t last = (size_t)(address - region->base + size - 1) / region->granule;
  for (size_t number = first; number <= last; number++)
    access_cell(region, number, access, pc, line);
}

void __sim_atomic(uint64_t address, uint32_t size, uint32_t access, uint32_t site) {
  if (!checked) return;
  uint32_t pc = object_offset(__builtin_return_address(0));
  access_memory((const char *)address, size, access | ATOMIC, pc, site >> 12);
}

#define RETURN_PC object_offset(__builtin_return_address(0))
#define ACCESS_CALLBACKS(size)                    \
  void __tsan_read##size(void *p) {               \
    access_memory(p, size, READS, RETURN_PC, 0);  \
  }                                               \
  void __tsan_write##size(void *p) {              \
    access_memory(p, size, WRITES, RETURN_PC, 0); \
  }                                               \
  void __tsan_unaligned_read##size(void *p) {     \
    access_memory(p, size, READS, RETURN_PC, 0);  \
  }                                               \
  void __tsan_unaligned_write##size(void *p) {    \
    access_memory(p, size, WRITES, RETURN_PC, 0); \
  }
ACCESS_CALLBACKS(1)
ACCESS_CALLBACKS(2)
ACCESS_CALLBACKS(4)
ACCESS_CALLBACKS(8)
ACCESS_CALLBACKS(16)

void *__tsan_memcpy(void *to, const void *from, size_t size) {
  access_memory(from, size, READS, RETURN_PC, 0);
  access_memory(to, size, WRITES, RETURN_PC, 0);
  return memmove(to, from, size);
}

void *__tsan_memmove(void *to, const void *from, size_t size) {
  access_memory(from, size, READS, RETURN_PC, 0);
  access_memory(to, size, WRITES, RETURN_PC, 0);
  return memmove(to, from, size);
}

void *__tsan_memset(void *to, int byte, size_t size) {
  access_memory(to, size, WRITES, RETURN_PC, 0);
  return memset(to, byte, size);
}

// ---- Undefined behaviour ------------------------------------------------------------------------

struct ub_location {
  const char *file;
  uint32_t line, column;
};

struct ub_type {
  uint16_t kind, info;
  char name[];
};

struct ub_operation {
  struct ub_location at;
  const struct ub_type *type;
};

struct ub_index {
  struct ub_location at;
  const struct ub_type *array, *index;
};

struct ub_pointer {
  struct ub_location at;
  const struct ub_type *type;
  uint8_t log2_alignment, kind;
};

static struct place ub_place(const struct ub_location *at, const void *pc) {
  return here(object_offset(pc), strcmp(at->file, "kernel") ? 0 : at->line);
}

// The value of an integer of this type; wider ones than 64 bits don't exist here.
static long long ub_value(const struct ub_type *type, uint64_t value) {
  uint32_t bits = 1u << (type->info >> 1);
  bool is_signed = type->info & 1;
  if (bits >= 64 || !is_signed) return (long long)value;
  return (long long)(value << (64 - bits)) >> (64 - bits);
}

#define OVERFLOW_CALLBACK(operation, sign, verdict)                                               \
  void __ubsan_handle_##operation##_overflow(struct ub_operation *data, uint64_t a, uint64_t b) { \
    stop(                                                                                         \
        "overflow", ub_place(&data->at, __builtin_return_address(0)),                             \
        "%lld " sign " %lld " verdict " %s", ub_value(data->type, a), ub_value(data->type, b),    \
        data->type->name);                                                                        \
  }
OVERFLOW_CALLBACK(add, "+", "doesn't fit into")
OVERFLOW_CALLBACK(sub, "-", "doesn't fit into")
OVERFLOW_CALLBACK(mul, "*", "doesn't fit into")
OVERFLOW_CALLBACK(divrem, "/", "has no value in")

void __ubsan_handle_negate_overflow(struct ub_operation *data, uint64_t value) {
  stop(
      "overflow", ub_place(&data->at, __builtin_return_address(0)), "-(%lld) doesn't fit into %s",
      ub_value(data->type, value), data->type->name);
}

void __ubsan_handle_out_of_bounds(struct ub_index *data, uint64_t index) {
  stop(
      "bounds", ub_place(&data->at, __builtin_return_address(0)),
      "index %lld of an array of type %s", ub_value(data->index, index), data->array->name);
}

static void stop_for_alignment(struct place place, uint64_t pointer, uint32_t alignment) {
  stop(
      "alignment", place, "this pointer must be a multiple of %u, but is %llu more than one",
      alignment, (unsigned long long)(pointer % alignment));
}

void __ubsan_handle_type_mismatch_v1(struct ub_pointer *data, uint64_t pointer) {
  struct place place = ub_place(&data->at, __builtin_return_address(0));
  stop_for_alignment(place, pointer, 1u << data->log2_alignment);
}

void __sim_misaligned(uint64_t address, uint32_t alignment, uint32_t site) {
  if (checked) stop_for_alignment(here(0, site >> 12), address, alignment);
}

// ---- Collectives and barriers: the thread's side ------------------------------------------------

static void wait_at(enum state state, const char *operation, uint32_t site, const void *pc) {
  struct lane *lane = &lanes[current];
  lane->state = state;
  lane->operation = operation;
  lane->site = site;
  lane->pc = object_offset(pc);
  step(lane->pc);
  to_scheduler();
}

uint32_t __sim_lane(void) {
  return current % SIMD_WIDTH;
}

// Hands a value to the SIMD-group and returns when all its lanes have done so. `caller` is the
// address that the collective returns to: the same text in another place of the program is another
// operation.
struct slots *__sim_exchange(
    const void *value, uint32_t size, const char *operation, uint32_t site, const void *caller) {
  struct lane *lane = &lanes[current];
  lane->value = value;
  lane->value_size = size;
  lane->flags = 0;
  wait_at(AT_COLLECTIVE, operation, site, caller);
  struct slots *mine = &slots[simdgroup(current)];
  mine->lane = current % SIMD_WIDTH;
  return mine;
}

void __sim_simdgroup_barrier(uint32_t flags, uint32_t site) {
  struct lane *lane = &lanes[current];
  lane->value_size = 0;
  lane->flags = flags;
  wait_at(AT_COLLECTIVE, "simdgroup_barrier", site, __builtin_return_address(0));
}

void __sim_threadgroup_barrier(uint32_t flags, uint32_t site) {
  lanes[current].flags = flags;
  wait_at(AT_BARRIER, "threadgroup_barrier", site, __builtin_return_address(0));
}

// ---- Collectives and barriers: the scheduler's side ---------------------------------------------

static bool same_operation(const struct lane *a, const struct lane *b) {
  return a->state == b->state && a->site == b->site && a->pc == b->pc && a->chain == b->chain;
}

static void report_divergence(uint32_t first, uint32_t other, const char *whom) {
  char place[64];
  const struct lane *waiting = &lanes[first], *away = &lanes[other];
  bool gone = away->state == DONE;
  report(
      "divergence", place_of(waiting),
      "%s is not reached by all threads of %s: in threadgroup (%u, %u, %u) thread %u waits here, "
      "thread %u %s%s%s%s",
      waiting->operation, whom, group % groups[0], group / groups[0] % groups[1],
      group / groups[0] / groups[1], first, other, gone ? "has returned" : "waits at ",
      gone ? "" : away->operation, gone ? "" : " at ",
      gone ? "" : write_place(place, sizeof place, place_of(away)));
}

static void synchronise(uint32_t flags, uint32_t clocks[SPACES], uint32_t time) {
  enum { MEM_DEVICE = 1, MEM_THREADGROUP = 2 };
  if (flags & MEM_DEVICE) clocks[DEVICE_MEMORY] = time;
  if (flags & MEM_THREADGROUP) clocks[THREADGROUP_MEMORY] = time;
}

// Performs the collective that a SIMD-group waits at, if it does; true if its lanes can go on.
static bool resolve_collective(uint32_t number) {
  uint32_t low = number * SIMD_WIDTH;
  uint32_t high = low + SIMD_WIDTH < thread_count ? low + SIMD_WIDTH : thread_count;
  uint32_t first = low;
  while (first < high && lanes[first].state != AT_COLLECTIVE) first++;
  if (first == high) return false;
  for (uint32_t i = low; i < high; i++)
    if (!same_operation(&lanes[i], &lanes[first])) {
      report_divergence(first, i, "the SIMD-group");
      return false;
    }
  struct slots *shared = &slots[number];
  shared->active = shared->done = 0;
  collectives++;
  for (uint32_t i = low; i < high; i++) {
    shared->active |= 1u << (i - low);
    memcpy(shared->data[i - low], lanes[i].value, lanes[i].value_size);
    lanes[i].state = READY;
  }
  uint32_t clocks[SPACES] = {simdgroup_clock[0][number], simdgroup_clock[1][number]};
  synchronise(lanes[first].flags, clocks, ++now);
  for (int space = 0; space < SPACES; space++) simdgroup_clock[space][number] = clocks[space];
  return true;
}

// All threads wait at a barrier or are done: true if the barrier let them go on.
static bool resolve_barrier(void) {
  uint32_t first = 0;
  while (first < thread_count && lanes[first].state == DONE) first++;
  if (first == thread_count) return false;
  for (uint32_t i = 0; i < thread_count; i++)
    if (!same_operation(&lanes[i], &lanes[first])) {
      report_divergence(first, i, "the threadgroup");
      return false;
    }
  synchronise(lanes[first].flags, barrier_clock, ++now);
  for (uint32_t i = 0; i < thread_count; i++) lanes[i].state = READY;
  return true;
}

// ---- Scheduler ----------------------------------------------------------------------------------

static uint32_t random_below(uint32_t limit) {
  random_state = random_state * 1664525u + 1013904223u;
  return (random_state >> 8) % limit;
}

static void put_in_order(uint32_t *numbers, uint32_t count) {
  for (uint32_t i = 0; i < count; i++) numbers[i] = order == REVERSE ? count - 1 - i : i;
  for (uint32_t i = count; order == SHUFFLED && i > 1; i--) {
    uint32_t j = random_below(i), swapped = numbers[i - 1];
    numbers[i - 1] = numbers[j];
    numbers[j] = swapped;
  }
}

static bool run_simdgroup(uint32_t number) {
  do {
    for (uint32_t i = 0; i < SIMD_WIDTH; i++) {
      uint32_t thread = number * SIMD_WIDTH + lane_order[i];
      if (thread >= thread_count || lanes[thread].state != READY) continue;
      resume(thread);
      if (failed) return false;
    }
  } while (resolve_collective(number));
  return !failed;
}

static bool run_threadgroup(void) {
  uint32_t simdgroups = (thread_count + SIMD_WIDTH - 1) / SIMD_WIDTH;
  group_start = ++now;
  for (int space = 0; space < SPACES; space++) {
    barrier_clock[space] = group_start;
    for (uint32_t i = 0; i < simdgroups; i++) simdgroup_clock[space][i] = group_start;
  }
  for (uint32_t i = 0; i < variable_count; i++) memset(variables[i].base, 0xff, variables[i].size);
  for (uint32_t i = 0; i < thread_count; i++) start_fiber(i);
  put_in_order(lane_order, SIMD_WIDTH);
  put_in_order(simdgroup_order, simdgroups);
  do {
    for (uint32_t i = 0; i < simdgroups; i++)
      if (!run_simdgroup(simdgroup_order[i])) return false;
  } while (resolve_barrier());
  return !failed;
}

static void set_positions(const uint32_t *grid, const uint32_t *threadgroup) {
  uint32_t at[3] = {
      group % groups[0], group / groups[0] % groups[1], group / groups[0] / groups[1]};
  uint32_t size[3];
  for (int i = 0; i < 3; i++) { // threadgroups at the edge of the grid are trimmed
    uint32_t left = grid[i] - at[i] * threadgroup[i];
    size[i] = left < threadgroup[i] ? left : threadgroup[i];
  }
  thread_count = size[0] * size[1] * size[2];
  for (uint32_t thread = 0; thread < thread_count; thread++) {
    struct positions *p = &positions[thread];
    uint32_t in_group[3] = {
        thread % size[0], thread / size[0] % size[1], thread / size[0] / size[1]};
    for (int i = 0; i < 3; i++) {
      p->threads_per_grid[i] = grid[i];
      p->thread_position_in_grid[i] = at[i] * threadgroup[i] + in_group[i];
      p->thread_position_in_threadgroup[i] = in_group[i];
      p->threadgroup_position_in_grid[i] = at[i];
      p->threadgroups_per_grid[i] = groups[i];
      p->threads_per_threadgroup[i] = size[i];
      p->dispatch_threads_per_threadgroup[i] = threadgroup[i];
    }
    p->thread_index_in_threadgroup = thread;
    p->thread_index_in_simdgroup = thread % SIMD_WIDTH;
    p->simdgroup_index_in_threadgroup = simdgroup(thread);
    p->simdgroups_per_threadgroup = (thread_count + SIMD_WIDTH - 1) / SIMD_WIDTH;
  }
}

static void *map(size_t size, int protection) {
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void *start = mmap(NULL, size, protection, flags, -1, 0);
  return start == MAP_FAILED ? NULL : start;
}

static bool prepare_memory(void) {
  if (stacks) return true;
  arena = map(ARENA_SIZE, PROT_READ | PROT_WRITE);
  arena_shadow = map(ARENA_SIZE * sizeof(struct cell), PROT_READ | PROT_WRITE);
  char *start = map(STACK_SIZE * MAX_THREADS, PROT_READ | PROT_WRITE);
  if (!arena || !arena_shadow || !start) return false;
  for (int i = 0; i < MAX_THREADS; i++) {
    lanes[i].stack = start + STACK_SIZE * (size_t)i;
    mprotect(lanes[i].stack, PAGE, PROT_NONE); // a stack that overflows stops here
  }
  stacks = start;
  return true;
}

// ---- For the host -------------------------------------------------------------------------------

// The kernel's object in memory: program counters are told as offsets into it.
void sim_object(char *start, char *end) {
  object_start = start;
  object_end = end;
}

static size_t mapped_size(const struct region *region) {
  return (region->skew + region->size + PAGE - 1) / PAGE * PAGE + 2 * GAP;
}

static size_t shadow_size(const struct region *region) {
  return (region->size / region->granule + 1) * sizeof(struct cell);
}

// Registers a buffer and returns its address: `borrowed` itself, or new memory between inaccessible
// gaps that begins `skew` bytes after a page. NULL if there is no memory.
void *sim_buffer(
    const char *name, size_t size, uint32_t element, uint32_t flags, uint32_t skew,
    void *borrowed) {
  if (buffer_count == MAX_REGIONS) return NULL;
  struct region *region = &buffers[buffer_count];
  *region = (struct region){
      .base = borrowed,
      .size = size,
      .element = element,
      .granule = granule_of(element),
      .flags = flags | (borrowed ? BORROWED : 0),
      .skew = skew,
      .space = DEVICE_MEMORY};
  snprintf(region->name, sizeof region->name, "%s", name);
  if (!borrowed) {
    size_t mapped = mapped_size(region);
    char *start = map(mapped, PROT_NONE);
    if (!start) return NULL;
    if (mapped > 2 * GAP) mprotect(start + GAP, mapped - 2 * GAP, PROT_READ | PROT_WRITE);
    region->base = start + GAP + skew;
  }
  // Zeros are an empty record, so cells that nothing touches cost no memory.
  if (!(flags & (READ_ONLY | UNCHECKED))) {
    region->shadow = map(shadow_size(region), PROT_READ | PROT_WRITE);
    if (!region->shadow) return NULL;
  }
  buffer_count++;
  return region->base;
}

// Forgets the last run's buffers.
void sim_reset(void) {
  for (uint32_t i = 0; i < buffer_count; i++) {
    struct region *region = &buffers[i];
    if (!(region->flags & BORROWED)) munmap(region->base - region->skew - GAP, mapped_size(region));
    if (region->shadow) munmap(region->shadow, shadow_size(region));
  }
  buffer_count = 0;
  failed = false;
  steps = accesses = switches = collectives = 0;
}

struct run {
  entry_function entry;
  const uint64_t *arguments;
  uint8_t *statements_run;
  double time_limit;
  uint32_t grid[3], threadgroup[3];
  uint32_t statement_count, order, seed, checked;
};

// 0 if all went well; the fault is in sim_fault() if not.
int sim_run(const struct run *run) {
  if (!prepare_memory()) {
    report("memory", (struct place){0}, "no memory for the stacks of %d threads", MAX_THREADS);
    return failed;
  }
  forget_variables();
  entry = run->entry;
  arguments = run->arguments;
  statements_run = run->statements_run;
  statement_count = run->statement_count;
  order = run->order;
  random_state = run->seed;
  checked = run->checked;
  time_limit = run->time_limit;
  deadline = seconds() + time_limit;
  for (int i = 0; i < 3; i++)
    groups[i] = (run->grid[i] + run->threadgroup[i] - 1) / run->threadgroup[i];
  group_count = groups[0] * groups[1] * groups[2];
  uint32_t *sequence = malloc(group_count * sizeof *sequence);
  put_in_order(sequence, group_count);
  for (uint32_t i = 0; i < group_count && !failed; i++) {
    group = sequence[i];
    set_positions(run->grid, run->threadgroup);
    run_threadgroup();
  }
  free(sequence);
  return failed;
}

const struct fault *sim_fault(void) {
  return &fault_found;
}

// How many elements of a buffer nothing has written, and the first of them.
uint64_t sim_unwritten(const void *base, uint64_t *first) {
  struct region *region = find(buffers, buffer_count, base, 0);
  uint64_t count = 0;
  for (size_t i = region->size / region->granule; i-- > 0;) {
    if (region->shadow[i].write.scope != NOBODY) continue;
    *first = i * region->granule / region->element;
    count++;
  }
  return count * region->granule / region->element;
}

// The first element that a thread has written with bits of ones only, counted from 1; 0 if there is
// none. `pc` is where.
uint64_t sim_ones(const void *base, uint32_t *pc) {
  struct region *region = find(buffers, buffer_count, base, 0);
  char ones[16];
  memset(ones, 0xff, sizeof ones);
  for (size_t i = 0; i < region->size / region->element; i++) {
    const struct cell *cell = &region->shadow[i * region->element / region->granule];
    if (cell->write.scope == NOBODY) continue;
    if (memcmp(region->base + i * region->element, ones, region->element)) continue;
    *pc = cell->write.pc;
    return i + 1;
  }
  return 0;
}

void sim_statistics(uint64_t *numbers) {
  numbers[0] = accesses;
  numbers[1] = switches;
  numbers[2] = collectives;
  numbers[3] = threadgroup_bytes;
}

// ---- Conversions that the compiler's support library would have ---------------------------------

// float to bfloat, to nearest even. The kernel's object is linked without that library.
__bf16 __truncsfbf2(float number) {
  uint32_t bits;
  memcpy(&bits, &number, sizeof bits);
  bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
  uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
  uint16_t high = (uint16_t)(is_nan ? bits >> 16 | 0x40 : rounded >> 16);
  __bf16 result;
  memcpy(&result, &high, sizeof result);
  return result;
}
