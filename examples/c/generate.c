/* Goes on with a sequence of token ids:  generate ARTIFACT COUNT [--seed N] ID...
 *
 *   cc generate.c $(pkg-config --cflags --libs gristmill) -o generate
 *   ./generate tinyllama.grist 16 1 15043 29892
 *
 * It prints the ids that follow, on one line, up to COUNT of them or an id that ends the text. Which text they are
 * the model's tokenizer.json says; any tokenizers library reads it. */
#include <gristmill.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int failed(void) {
  fprintf(stderr, "error: %s\n", gristmill_last_error());
  return 1;
}

static int number(const char *text, long long most, long long *value) {
  char *end;
  *value = strtoll(text, &end, 10);
  if (*text && !*end && *value >= 0 && *value <= most) return 1;
  fprintf(stderr, "error: got %s, expected a number from 0 to %lld\n", text, most);
  return 0;
}

static int ends(const int32_t *ids, int64_t count, int32_t id) {
  for (int64_t i = 0; i < count; i++) {
    if (ids[i] == id) return 1;
  }
  return 0;
}

static int generate(gristmill_model *model, const int32_t *prompt, int64_t length, long long count,
                    const gristmill_sampling *sampling) {
  int32_t end_ids[64], last = 0;
  const int64_t end_count = gristmill_end_ids(model, end_ids, 64);
  for (long long i = 0; i < count; i++) {
    const int32_t *tokens = i ? &last : prompt;
    const int64_t given = i ? 1 : length;
    last = sampling ? gristmill_sample(model, 0, tokens, given, sampling) : gristmill_greedy(model, 0, tokens, given);
    if (last < 0) return failed();
    if (ends(end_ids, end_count < 64 ? end_count : 64, last)) break;
    printf(i ? " %d" : "%d", (int)last);
    fflush(stdout);
  }
  printf("\n");
  return 0;
}

int main(int argc, char **argv) {
  gristmill_sampling sampling = GRISTMILL_SAMPLING_INIT;
  gristmill_options options = GRISTMILL_OPTIONS_INIT;
  long long count, value;
  int first = 3;
  if (argc < 4) {
    fprintf(stderr, "usage: %s ARTIFACT COUNT [--seed N] ID...\n", argv[0]);
    return 2;
  }
  if (!number(argv[2], 1000000, &count)) return 2;
  if (argc > 5 && strcmp(argv[3], "--seed") == 0) {
    if (!number(argv[4], INT64_MAX, &value)) return 2;
    sampling.seed = (uint64_t)value;
    first = 5;
  }
  const int64_t length = argc - first;
  int32_t *prompt = malloc((size_t)length * sizeof *prompt);
  if (!prompt) return 1;
  for (int64_t i = 0; i < length; i++) {
    if (!number(argv[first + i], INT32_MAX, &value)) return free(prompt), 2;
    prompt[i] = (int32_t)value;
  }
  options.max_slots = 1;
  gristmill_model *model = gristmill_open(argv[1], &options);
  const int code = model ? generate(model, prompt, length, count, first > 3 ? &sampling : NULL) : failed();
  gristmill_close(model);
  free(prompt);
  return code;
}
