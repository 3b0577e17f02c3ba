/* gristmill: runs compiled artifacts on the CPU, for C and whatever calls C.
 *
 *   gristmill_model *model = gristmill_open("tinyllama.grist", NULL);
 *   int32_t id = gristmill_greedy(model, 0, prompt, prompt_length);
 *   while (id >= 0 && !done(id)) id = gristmill_greedy(model, 0, &id, 1);
 *   gristmill_close(model);
 *
 * An opened artifact has slots, each of them room for one sequence of tokens. Appending tokens computes their keys
 * and values; positions count from 0, and nothing is forgotten until it is truncated.
 *
 * Errors: functions that fail return NULL or -1, and gristmill_last_error() says why in one line. Nothing that is
 * passed in, no file and no lack of memory ends the process or throws.
 *
 * Threads: calls on one opened artifact take turns, whatever threads they come from; opened artifacts are
 * independent of each other, and those of one file share its weights. gristmill_close must be the last call.
 * Pointers that are passed in need to be valid during the call alone.
 *
 * Versions: GRISTMILL_API counts changes that break callers; the library's soname carries it. Structs that may
 * grow begin with their size, set by their _INIT.
 */
#ifndef GRISTMILL_H
#define GRISTMILL_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define GRISTMILL_API 1

#if defined(__GNUC__)
#define GRISTMILL_EXPORT __attribute__((visibility("default")))
#else
#define GRISTMILL_EXPORT
#endif

/* An opened artifact. */
typedef struct gristmill_model gristmill_model;

/* Zeros and NULL are defaults. */
typedef struct gristmill_options {
  size_t size;        /* GRISTMILL_OPTIONS_INIT sets it */
  int64_t max_len;    /* positions of each slot; default: the artifact's, which is the most */
  int64_t max_slots;  /* sequences at once; default: the artifact's */
  int32_t threads;    /* default: one for each physical core that the process may use */
  int32_t huge_pages; /* 1: copy the weights into huge pages instead of mapping the file */
  int32_t pinned;     /* 1: threads stay on processors of their own */
  const char *isa;    /* "portable", "avx2", "avx512", "avx512vnni"; default: the best that runs here */
} gristmill_options;

#define GRISTMILL_OPTIONS_INIT {sizeof(gristmill_options), 0, 0, 0, 0, 0, NULL}

typedef struct gristmill_limits {
  size_t size; /* GRISTMILL_LIMITS_INIT sets it */
  int64_t max_len, max_slots;
  int64_t max_tokens; /* the most rows of one gristmill_forward */
  int64_t vocabulary; /* floats of one row of logits; ids are below it */
  int64_t threads;
  uint64_t weight_bytes, kv_bytes;
} gristmill_limits;

#define GRISTMILL_LIMITS_INIT {sizeof(gristmill_limits), 0, 0, 0, 0, 0, 0, 0}

/* How a token is drawn: logits over temperature, the top_k best (with equals of the last), of these the fewest that
 * reach top_p, then one draw. It depends on (seed, sequence, position) alone, by Philox 4x64-10, and is the draw of
 * gristmill.Session for the same seed and the first sequence, 0; where two tokens meet within rounding, of the
 * exponential function, the two may differ. */
typedef struct gristmill_sampling {
  size_t size; /* GRISTMILL_SAMPLING_INIT sets it, and what is neutral: temperature 1, no top_k, top_p 1 */
  float temperature; /* above 0 */
  float top_p;       /* above 0, at most 1 */
  int64_t top_k;     /* 0: all */
  uint64_t seed, sequence;
} gristmill_sampling;

#define GRISTMILL_SAMPLING_INIT {sizeof(gristmill_sampling), 1.f, 1.f, 0, 0, 0}

/* The library's GRISTMILL_API. */
GRISTMILL_EXPORT int gristmill_api(void);

/* What this thread's last failed call failed of; valid until its next call, "" where none has failed. */
GRISTMILL_EXPORT const char *gristmill_last_error(void);

/* Opens the directory that `gristmill compile` wrote; options may be NULL. Its program and all files but the
 * weights' data are held to the hashes of its manifest, and the program is checked before anything runs. */
GRISTMILL_EXPORT gristmill_model *gristmill_open(const char *artifact, const gristmill_options *options);

/* NULL is fine. */
GRISTMILL_EXPORT void gristmill_close(gristmill_model *model);

GRISTMILL_EXPORT int gristmill_get_limits(gristmill_model *model, gristmill_limits *limits);

/* How many ids end a text, by the model's generation_config.json; the first `capacity` of them go to ids. */
GRISTMILL_EXPORT int64_t gristmill_end_ids(gristmill_model *model, int32_t *ids, int64_t capacity);

/* Appends tokens[count], one at least, to a slot and returns the most likely token after them, the lowest id among
 * equals. That token is not in the slot yet: give it to the next call. */
GRISTMILL_EXPORT int32_t gristmill_greedy(gristmill_model *model, int64_t slot, const int32_t *tokens, int64_t count);

/* The same, with a token that is drawn. */
GRISTMILL_EXPORT int32_t gristmill_sample(gristmill_model *model, int64_t slot, const int32_t *tokens, int64_t count,
                                          const gristmill_sampling *sampling);

/* How many positions a slot holds. */
GRISTMILL_EXPORT int64_t gristmill_length(gristmill_model *model, int64_t slot);

/* Keeps the first `length` positions of a slot; 0 empties it. With a sliding window only as far back as its ring
 * still holds what a token there attends to. */
GRISTMILL_EXPORT int gristmill_truncate(gristmill_model *model, int64_t slot, int64_t length);

/* Slot `to` becomes the first `length` positions of slot `from`: a prompt that is shared is computed once. */
GRISTMILL_EXPORT int gristmill_copy(gristmill_model *model, int64_t from, int64_t to, int64_t length);

/* One forward of a batch: row t is tokens[t] at positions[t] of slots[t], rows <= max_tokens, of several slots if
 * wanted. A slot's rows go on at its length, or at an earlier position, which truncates it, without a gap.
 * logits[r * vocabulary], r < wanted_rows, are those of row wanted[r]. A row's logits have the same bits in any
 * batch. */
GRISTMILL_EXPORT int gristmill_forward(gristmill_model *model, const int32_t *tokens, const int32_t *positions,
                                       const int32_t *slots, int64_t rows, const int32_t *wanted,
                                       int64_t wanted_rows, float *logits);

#ifdef __cplusplus
}
#endif
#endif
