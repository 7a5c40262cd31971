/* nla.h - Natural Language Autoencoders, the whole program on one page-through.
 *
 * Reading order: errors, files, configuration, tokenizer, engine (the op table), model, the forest batch,
 * the forward pass, sampling, datasets. Each source file opens with what it is; the tour is docs/architecture.md.
 *
 * Shape letters, everywhere the same:
 *   N tokens (rows) in a packed batch   S segments      D model width      H query heads   G key/value heads
 *   E head width   F feed-forward width   V vocabulary   L layers (blocks)
 *
 * Every function that can fail takes an `Err *` last and returns 0 / a pointer on success, -1 / NULL on failure with
 * one line in err->msg: what, where, why, how to mend it. Nothing prints, exits or aborts but the
 * commands (run_X) and main.
 * Memory: a function named X_open, X_load or X_new has a matching X_close or X_free that the caller calls. Arrays
 * whose comment says "stb" are stb_ds arrays (arrlen, arrput, arrfree).
 */
#ifndef NLA_H
#define NLA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ------------------------------------------------------------------------------------------------ errors, memory */

typedef struct Settings Settings; /* what a command line says: the command layer, below */

/* An option of a command, or a setting of a training run. */
typedef enum { OPTION_FLAG, OPTION_COUNT, OPTION_SEED, OPTION_NUMBER, OPTION_TEXT } OptionKind;
typedef struct {
    const char *name, *value; /* value: how help calls it (DIR, FILE: a path; a|b|c: those words); NULL: a flag takes none */
    OptionKind kind;
    size_t place; /* offset of what it sets, in Settings or RunSettings */
    double least, most;
    const char *help;
} Option;

typedef struct Err {
    char msg[1024]; /* one line, no newline at the end */
} Err;

/* Formats the message (control characters become '?', so a hostile file name cannot write to the terminal) and
 * returns -1, so that a caller can `return fail(err, ...)`. The first message stays: later calls do not overwrite it. */
int(fail)(Err *err, const char *format, ...) __attribute__((format(printf, 2, 3)));
#ifdef __clang_analyzer__ /* which cannot see from another file that fail always returns -1 */
#define fail(...) (fail(__VA_ARGS__), -1)
#endif

/* malloc/calloc/strdup that end the program with one line and exit status 1 when memory runs out. For small things;
 * what grows with the model or the batch goes through Engine.alloc, which reports an error. */
void *xmalloc(size_t bytes);
void *xcalloc(size_t count, size_t bytes);
char *xstrdup(const char *text);
char *xstrndup(const char *text, size_t len);
char *xprintf(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* ------------------------------------------------------------------------------------------------ files: mapped, JSON */

/* A whole file, mapped read-only. If the file shrinks while it is mapped, reading past its new end ends the program
 * with one line naming the file and exit status 1 (file_guard installs the SIGBUS handler that does so). */
typedef struct {
    char *path;
    const char *data; /* NULL when the file is empty */
    size_t len;
} File;

void file_guard(void);
int file_map(File *file, const char *path, Err *err); /* fails on directories, devices, unreadable files */
void file_unmap(File *file);

/* Writes `len` bytes to `path` so that a reader sees the old file or the whole new one, never a part: temporary name
 * beside it, fsync, rename, fsync of the directory. */
int file_write(const char *path, const void *data, size_t len, Err *err);
int file_sync_dir(const char *path, Err *err); /* fsync of the directory that holds `path`: makes a rename last */
char *path_beside(const char *path, const char *suffix); /* "dir/" and ".part" -> "dir.part", to be freed */
void remove_tree(const char *path);              /* a directory and all in it; says nothing of what cannot be removed */

/* A directory that is made as `temp` and takes its name when it is whole. */
typedef struct {
    char *final, *temp;
} Staging;
int stage(Staging *s, const char *dir, Err *err);
int unstage(Staging *s, int status, Err *err); /* status 0: renames; else removes what there is. Returns the status, frees s */

/* JSON, strict (RFC 8259), read with jsmn. Nodes are indices; 0 is the root, -1 is "none" and every accessor takes it.
 *   for (int k = json_first(j, object); k >= 0; k = json_next(j, k))   in an object k is the key and k + 1 its value
 *   for (int v = json_first(j, array);  v >= 0; v = json_next(j, v))   in an array v is the element            */
typedef struct {
    const char *text; /* borrowed: must outlive the Json */
    size_t len;
    const char *file;     /* borrowed: for messages */
    void *node;           /* owned: jsmn's tokens */
    int n_nodes;
} Json;

typedef enum { JSON_NONE, JSON_OBJECT, JSON_ARRAY, JSON_STRING, JSON_NUMBER, JSON_BOOL, JSON_NULL } JsonType;

int json_parse(Json *json, const char *text, size_t len, const char *file, Err *err);
void json_free(Json *json);
JsonType json_type(const Json *json, int node);
int json_first(const Json *json, int node);
int json_next(const Json *json, int node);
int json_size(const Json *json, int node); /* elements of an array, pairs of an object, else 0 */
/* Value of `key` in `object`, or -1. Fails softly on a duplicate key: json_parse has already refused those in objects of
 * up to 10,000 keys; larger ones (vocabularies) are checked by whoever reads them. */
int json_get(const Json *json, int object, const char *key);
bool json_is(const Json *json, int node, const char *text); /* a string equal to text */
bool json_int(const Json *json, int node, int64_t *value);  /* a number without fraction that fits */
bool json_double(const Json *json, int node, double *value);
bool json_bool(const Json *json, int node, bool *value);
/* The string's bytes, unescaped, NUL-terminated, to be freed; *len (may be NULL) is its length, as it may hold NULs.
 * NULL when the node is not a string. Lone surrogates become U+FFFD. */
char *json_string(const Json *json, int node, size_t *len);
/* The raw bytes between the quotes when they hold no escape (the fast path for vocabularies), else NULL. */
const char *json_raw(const Json *json, int node, size_t *len);
/* Writes `text` as a JSON string with its quotes; invalid UTF-8 is written as U+FFFD. */
void json_write_string(FILE *out, const char *text, size_t len);
/* Writes `, "key": value`, a member that is not the object's first: null for no text, for NaN and infinity. */
void json_text(FILE *out, const char *key, const char *text);
void json_number(FILE *out, const char *key, double value); /* six digits; a whole number all of its own */

/* The hash of a name and where it stands. Sorted by hash, a list of them finds repeats and looks names up in n log n
 * whatever the names are; a hash table could be made quadratic by names chosen to collide. */
typedef struct NameHash {
    uint64_t hash;
    int place;
} NameHash;
NameHash name_hash(const char *name, size_t len, int place);
/* Sorts; returns the place of a name that stood before, or -1. Names of equal 64-bit hash count as equal: that refuses
 * only files made for the purpose. */
int sort_and_find_repeat(NameHash *name, size_t n);

/* YAML 1.1 sidecars through libyaml, as a tree. Scalars keep their text; `quoted` tells "150" from 150. Unknown keys
 * survive a load and save; the root is always a map. Aliases are refused (no sidecar needs them, and they can grow without bound). */
typedef struct Yaml Yaml;
struct Yaml {
    enum { YAML_SCALAR, YAML_MAP, YAML_LIST } kind;
    char *text;  /* scalar */
    bool quoted; /* scalar written in quotes or as a block */
    char **key;  /* stb, map */
    Yaml **item; /* stb, map and list */
};

Yaml *yaml_load(const char *path, Err *err);
Yaml *yaml_parse(const char *text, size_t len, const char *file, Err *err);
#define yaml_free nla_yaml_free /* libyaml exports a yaml_free that it calls itself: ours must not take its place */
void yaml_free(Yaml *node);
int yaml_save(const Yaml *root, const char *path, Err *err); /* as file_write */
Yaml *yaml_new(int kind);
Yaml *yaml_get(const Yaml *map, const char *dotted_path); /* "extraction.layer_index"; NULL when absent */
/* Sets a scalar at a dotted path, making the maps on the way; replaces what stood there. */
void yaml_set(Yaml *map, const char *dotted_path, const char *text, bool quoted);
void yaml_set_number(Yaml *map, const char *dotted_path, double value); /* nine digits */
bool yaml_int(const Yaml *node, int64_t *value);
bool yaml_double(const Yaml *node, double *value);

/* ------------------------------------------------------------------------------------------------ tensors, safetensors */

typedef enum { DT_F32, DT_BF16, DT_F16, DT_I64, DT_I32, DT_U64, DT_U8, DT_OTHER } DType;
size_t dtype_size(DType dtype);       /* bytes of one element; 0 for DT_OTHER */
const char *dtype_name(DType dtype);  /* as safetensors spells it: "BF16" */

enum { MAX_DIMS = 8 };
typedef struct {
    const char *name; /* owned by the Safetensors it came from */
    DType dtype;
    int n_dims;
    int64_t shape[MAX_DIMS];
    const void *data; /* row-major; on the CPU inside the mapped file, never copied */
    size_t bytes;
} Tensor;

/* All tensors of one .safetensors file, or of an HF directory (model.safetensors, or the shards named by
 * model.safetensors.index.json). Everything in the headers is checked against the files' real sizes before it is used:
 * header length, offsets (inside the file, no overlap, no hole), products that overflow, dtype x shape = bytes,
 * duplicate names, NUL in names, an index naming tensors that its shards do not hold. */
typedef struct {
    File *file;     /* stb */
    Tensor *tensor; /* stb, in file order */
    NameHash *index; /* stb, sorted: hash of the name -> place in tensor[] */
} Safetensors;

int safetensors_open(Safetensors *st, const char *path, Err *err);
void safetensors_close(Safetensors *st);
const Tensor *safetensors_find(const Safetensors *st, const char *name); /* NULL when absent */

/* Writes a file of n tensors whose data is in memory, atomically (see file_write); data is 8-byte aligned. */
int safetensors_save(const char *path, const Tensor *tensor, int n, Err *err);
/* The header alone (8-byte length and JSON, padded with spaces to `pad_to` bytes in all when that is not 0), for a
 * writer that streams the data itself. To be freed; NULL when it does not fit into pad_to. */
char *safetensors_header(const Tensor *tensor, int n, size_t pad_to, size_t *len);

size_t tensor_elements(const Tensor *t); /* 0 when it has no data */
int tensor_to_floats(float *out, const Tensor *t); /* all of an F32, BF16 or F16 tensor; -1 for another dtype */
float bf16_to_f32(uint16_t bits);
uint16_t f32_to_bf16(float value); /* round to nearest, ties to even; NaN stays NaN */
float f16_to_f32(uint16_t bits);

/* ------------------------------------------------------------------------------------------------ configuration */

typedef enum { FAMILY_LLAMA, FAMILY_QWEN2, FAMILY_QWEN3, FAMILY_GEMMA3 } Family;

typedef struct {
    double theta;
    double linear_factor;  /* 1 = none: every frequency is divided by it */
    bool llama3;           /* `llama3` scaling, with the four numbers below */
    double factor, low_freq_factor, high_freq_factor, original_max_positions;
} Rope;

typedef struct {
    int window; /* key j is visible to query i when 0 <= i - j < window; 0 = no limit */
    int rope;   /* which of Config.rope: 0 global, 1 local (Gemma's sliding layers) */
} LayerKind;

typedef struct {
    Family family;
    char *model_type; /* as config.json says it */
    int hidden_size, n_layers, n_heads, n_kv_heads, head_dim, ff_size, vocab_size, max_positions;
    float rms_norm_eps;
    float embed_scale; /* 1, or sqrt(hidden_size) for Gemma, where the engine rounds it to its compute dtype as HF does */
    float attn_scale;  /* head_dim^-0.5 or query_pre_attn_scalar^-0.5 */
    bool tied;         /* lm_head is the embedding */
    bool qkv_bias, o_bias, mlp_bias;
    bool qk_norm;       /* RMSNorm of each query and key head before RoPE (Qwen3, Gemma 3) */
    bool norm_plus_one; /* RMSNorm multiplies by 1 + w (Gemma) */
    bool post_norms;    /* norms after attention and after the MLP, before the residual add (Gemma) */
    bool gelu;          /* gelu_tanh gate (Gemma) instead of silu */
    Rope rope[2];
    LayerKind *layer; /* [n_layers], owned */
    int *eos;         /* stb: end-of-sequence ids of config.json and generation_config.json; an AV's own beside them */
} Config;

/* Reads DIR/config.json (and generation_config.json for eos) with the class defaults of `transformers` for absent keys,
 * both spellings of RoPE, text_config inside wrappers. Refuses by name what this program does not compute (other
 * families, activations, rope types, soft-capping, ...). Source: transformers' configuration_{llama,qwen2,qwen3,gemma3}.py */
int config_load(Config *config, const char *dir, Err *err);
int config_parse(Config *config, const char *text, size_t len, const char *file, Err *err);
void config_free(Config *config);

/* ------------------------------------------------------------------------------------------------ tokenizer */

typedef struct Tokenizer Tokenizer;

/* Reads DIR/tokenizer.json and, when present, tokenizer_config.json (chat template, special tokens). */
Tokenizer *tokenizer_load(const char *dir, Err *err);
Tokenizer *tokenizer_parse(const char *json, size_t len, const char *file, Err *err); /* tokenizer.json's text alone */
void tokenizer_free(Tokenizer *tok);

int tokenizer_vocab_size(const Tokenizer *tok); /* largest id + 1 */
/* Appends the ids of text[0..len) to *ids (stb). `special` adds what the post-processor adds (BOS). Added tokens in the
 * text are always recognised, as HF does. Invalid UTF-8 is read as U+FFFD. Source: HF tokenizers' `encode`. */
int tokenizer_encode(const Tokenizer *tok, const char *text, size_t len, bool special, int **ids, Err *err);
/* The text of n ids, to be freed; *len (may be NULL) is its length. Bytes are joined across tokens, then validated: what
 * is not UTF-8 becomes U+FFFD. skip_special leaves out special added tokens. Unknown ids are left out, as HF does. */
char *tokenizer_decode(const Tokenizer *tok, const int *ids, int n, bool skip_special, size_t *len);
/* The bytes one id adds to the text (for streaming), possibly a part of a character. Borrowed; NULL for unknown ids. */
const char *tokenizer_piece(const Tokenizer *tok, int id, size_t *len);
/* The id of exactly this token (content as in the file), or -1. */
int tokenizer_id(const Tokenizer *tok, const char *token);
bool tokenizer_is_special(const Tokenizer *tok, int id);
/* BOS that `special` adds, or -1; the id of tokenizer_config.json's eos_token, or -1. */
int tokenizer_bos(const Tokenizer *tok);
int tokenizer_eos(const Tokenizer *tok);

typedef struct {
    const char *role; /* "system", "user", "assistant" */
    const char *content;
} ChatMessage;

/* The conversation as the model's chat template writes it, to be freed (tokenise it with special = false: the template
 * has its own BOS). The template is recognised by its markers (ChatML with the default system message it names,
 * Llama 3, Gemma); another template is an error. `date`: Llama 3.1's "Today Date", e.g. "26 Jul 2024"; NULL = that default.
 * Source: apply_chat_template of each family's tokenizer_config.json. */
char *chat_render(const Tokenizer *tok, const ChatMessage *message, int n, bool generation_prompt, const char *date,
                  Err *err);

/* ------------------------------------------------------------------------------------------------ the forest batch */

/* A segment is a run of consecutive tokens whose first follows the last token of its parent. A token attends to all
 * tokens of its ancestors and causally inside its own segment. A segment with children no longer grows. */
typedef struct {
    int parent;   /* segment, or -1: a root */
    int position; /* of its first token: the sum of its ancestors' lengths */
    int row;      /* its first row in the key/value cache; its tokens are contiguous from there */
    int len, cap; /* tokens so far, rows reserved */
} Segment;

/* Consecutive rows of a batch that are consecutive tokens of one segment. */
typedef struct {
    int seg;
    int row;   /* first row in the batch */
    int n;     /* rows */
    int first; /* offset inside the segment of the first of them */
} Run;

/* ------------------------------------------------------------------------------------------------ the engine: op table */

/* Memory of the engine. Only ops look inside. Each piece has the number format that it was asked for: activations act_dtype; fp32
 * on every engine are trained weights and their gradients, logits, attention's lse, cos and sin, and the vectors that an AR is to rebuild. */
typedef void Act;

/* A stack of weight matrices applied to the same input as one: q, k, v or gate, up. y = x [w0; w1; ..]^T + [b0; b1; ..] */
typedef enum { WEIGHTS_AS_STORED, WEIGHTS_INT8, WEIGHTS_FP8 } WeightFormat; /* a byte a weight, a scale a row: quantise.h */
typedef struct Linear Linear;
typedef struct Lora Lora;
struct Linear {
    int n;        /* matrices in the stack, 1 to 3 */
    Tensor w[3];  /* [O_i, I] */
    Tensor b[3];  /* [O_i], data NULL when there is none */
    int in, out;  /* I, sum of O_i */
    WeightFormat format; /* that `linear` rounds it to, at its first use */
    Lora *lora;   /* NULL: none */
};

/* Low-rank adapters of the matrices of a stack: y_i += scale * up_i (down_i x). */
struct Lora {
    Linear down; /* the adapted matrices' [R, I] as one stack, in order */
    Tensor up[3]; /* [O_i, R]; data NULL where a matrix has no adapter */
    int rank;
    float scale;
};

typedef struct {
    float beta1, beta2, eps, decay;
} AdamW;

/* Bytes that an engine holds and has held at the most: what alloc gave, working copies of weights, the ops' own working memory. */
typedef enum { MEMORY_GIVEN, MEMORY_COPIES, MEMORY_WORK, MEMORY_KINDS } MemoryKind;
typedef struct {
    size_t now[MEMORY_KINDS], peak[MEMORY_KINDS], most; /* most: of all kinds together */
} MemoryUse;

typedef struct Engine Engine;
struct Engine {
    const char *name;     /* "cpu avx512" */
    DType act_dtype;      /* of activations: DT_F32, or DT_BF16 on a GPU */
    bool bf16_dot;        /* products of bf16-rounded inputs, summed in fp32 (opt-in; CPU with AVX512-BF16) */
    int threads;
    WeightFormat weights; /* what models that are loaded from now on round their blocks' matrices to: set by whoever opens the engine */
    void *scratch;        /* the engine's own */

    /* Memory of the engine. alloc zeroes nothing and returns NULL when there is not enough. */
    Act *(*alloc)(Engine *e, DType dtype, size_t count);
    void (*free)(Engine *e, void *memory);
    void (*read)(Engine *e, float *host, const Act *x, size_t offset, size_t count);  /* x[offset..] -> fp32 on the host */
    void (*write)(Engine *e, Act *x, size_t offset, const float *host, size_t count); /* the other way */
    void (*put)(Engine *e, void *x, const void *host, size_t bytes);                  /* bytes as they are -> x */
    /* Host memory to read `bytes` of x in, as they are: x itself where the host can read it. Valid until unview. */
    const void *(*view)(Engine *e, const void *x, size_t bytes);
    void (*unview)(Engine *e, const void *x, const void *seen);
    /* Weights are given to ops where the host has them (mapped files, adapters); an engine with memory of its own keeps copies. To
     * be called before host memory that held weights is freed, unmapped or written: the copies of what is in it are dropped. */
    void (*forget)(Engine *e, const void *host, size_t bytes);
    int (*check)(Engine *e, Err *err); /* ops report nothing: -1 when one has failed (a GPU's memory or launch) since the opening */
    /* A step of decoding on its way to the ops (NULL: an engine that repeats nothing). Steps of equal `shape` are the same ops on the same
     * memory and host arrays; only what stands in them differs. begin_step may do the whole step: true, and the ops are left out. */
    bool (*begin_step)(Engine *e, const void *shape, size_t bytes);
    void (*end_step)(Engine *e);
    void (*close)(Engine *e);

    /* For measuring. Seconds that the engine itself spent from start to stop, which waits for all that was asked of it. */
    void (*start)(Engine *e);
    double (*stop)(Engine *e);
    void (*copy)(Engine *e, void *out, const void *x, size_t bytes); /* from its memory to its memory */
    size_t (*available)(Engine *e);                                  /* bytes that alloc could give now, about; 0: nobody knows */
    MemoryUse *memory;
    size_t upload_bytes; /* of the host's memory that weights go through on their way to a GPU's, until `check` */
    /* What it will take beside alloc: for a working copy of n tensors as one weight (NULL data: from the host; `owned`: their format in
     * its memory, one behind the other, DT_OTHER: not there; `precise`: norms, always fp32), and for its ops on passes of up to `rows` rows. */
    size_t (*copy_bytes)(Engine *e, const Tensor *t, int n, DType owned, bool precise);
    size_t (*work_bytes)(Engine *e, const Config *c, int rows, bool training);

    /* out[n,:] = table[token[n],:] * scale                                             out [N,D], table [V,D] */
    void (*embed)(Engine *e, Act *out, const Tensor *table, const int *token, int N, int D, float scale);

    /* out[n,:] = x[n,:] / sqrt(mean(x[n,:]^2) + eps) * (plus_one + w)                  out, x [N,D], w [D]
     * plus_one is 0 or 1. Source: LlamaRMSNorm, Gemma3RMSNorm. out may be x. */
    void (*rmsnorm)(Engine *e, Act *out, const Act *x, const Tensor *w, int N, int D, float eps, int plus_one);

    /* out[n,:] = x[n,:] W^T + b, W the stack                                           out [N,O], x [N,I] */
    void (*linear)(Engine *e, Act *out, const Act *x, const Linear *w, int N);

    /* Splits qkv [N, (H+2G)E]: normalises each query and key head (norm NULL: not), rotates them by the row's position
     * (rotate-half pairing: element i with i + E/2; cos, sin [max position, E/2], F32) and stores q [N, H*E] and rows
     * cache_row[n] of the caches k and v, which hold [rows, G*E] in an order that is the engine's own and that only
     * `attention` needs to know. Source: apply_rotary_pos_emb. */
    void (*rope_qkv)(Engine *e, Act *q, Act *k, Act *v, const Act *qkv, const Tensor *q_norm, const Tensor *k_norm,
                     float eps, int plus_one, const Act *cos, const Act *sin, const int *position,
                     const int *cache_row, int N, int H, int G, int E);

    /* out[n,h,:] = sum_j softmax_j(scale * q[n,h,:] . k[j,g,:]) v[j,g,:], g = h / (H/G), j over the tokens of the row's
     * ancestors and its own segment up to itself, and i - j < window when window > 0.   out, q [N, H*E]
     * lse [N,H], F32 (NULL: not wanted): ln of the softmax's denominator, which the gradient needs. */
    void (*attention)(Engine *e, Act *out, Act *lse, const Act *q, const Act *k, const Act *v, const Segment *segment,
                      const Run *run, int n_runs, int H, int G, int E, float scale, int window);

    /* out[n,f] = act(gate[n,f]) * up[n,f], act = silu or gelu_tanh                     gate_up [N,2F] -> out [N,F] */
    void (*gated)(Engine *e, Act *out, const Act *gate_up, int N, int F, bool gelu);

    void (*add)(Engine *e, Act *out, const Act *x, const Act *y, size_t count); /* out = x + y; out may be either */

    /* sum = x + y, out = rmsnorm of sum: what stands between two parts of a block. sum may be x or y, out neither. */
    void (*add_rmsnorm)(Engine *e, Act *sum, Act *out, const Act *x, const Act *y, const Tensor *w, int N, int D, float eps, int plus_one);

    void (*gather)(Engine *e, Act *out, const Act *x, const int *row, int n, int D); /* out[i,:] = x[row[i],:] */

    /* Draws one token a row from logits [n,V], F32: softmax(logits / temperature), cut to the top_k largest (0: all; ties at
     * the border all stay), then to the smallest set that reaches top_p (1: all), in the order HF applies them. The draw
     * is the token with the largest weight / -ln(1 - u), u uniform in (0,1) and keyed by (key[i], token): two engines whose logits
     * differ by rounding draw the same token unless two are all but tied. Temperature 0 takes the lowest id among the largest.
     * logprob[i]: of the drawn token under the uncut softmax at this temperature (at 1 when it is 0). */
    void (*sample)(Engine *e, int *token, float *logprob, const Act *logits, int n, int V, float temperature, int top_k,
                   float top_p, const uint64_t *key);

    /* ---- gradients. dX is the gradient of the loss with respect to X. Gradients of weights (dw: F32, data NULL = does not
     * train) are added to what is there, as segments and microbatches share them; gradients of activations are written,
     * or added where it says so. Every sum has one fixed order: no atomics, the same bits on any number of threads. */

    void (*zero)(Engine *e, void *x, size_t bytes);
    void (*scatter)(Engine *e, Act *out, const Act *x, const int *row, int n, int D); /* out[row[i],:] = x[i,:] */

    /* dtable[token[n],:] += scale * dx[n,:], rows with token -1 (injected) left out */
    void (*embed_backward)(Engine *e, const Tensor *dtable, const Act *dx, const int *token, int N, int D, float scale);

    /* dx (+)= r (w dy - x r^2 mean(w dy x)), r = 1 / sqrt(mean x^2 + eps), w with plus_one added; dw += sum_n dy x r.
     * dx may be dy when it is not added to. */
    void (*rmsnorm_backward)(Engine *e, Act *dx, const Tensor *dw, const Act *dy, const Act *x, const Tensor *w, int N, int D,
                             float eps, int plus_one, bool add);

    /* dx (+)= dy W, W the stack;   dw_i += dy_i^T x, db_i += sum_n dy_i                dx [N,I], dy [N,O] */
    void (*linear_backward)(Engine *e, Act *dx, const Act *dy, const Linear *w, int N, bool add);
    void (*linear_weight_backward)(Engine *e, const Linear *dw, const Act *dy, const Act *x, int N);

    /* y_i += scale * t_i up_i^T, t [N, R a adapted matrix] = down x;   dt_i = scale * dy_i up_i, dup_i += scale * dy_i^T t_i */
    void (*lora_up)(Engine *e, Act *y, const Act *t, const Linear *w, int N);
    void (*lora_up_backward)(Engine *e, Act *dt, const Lora *dlora, const Act *dy, const Act *t, const Linear *w, int N);

    /* The way back through rope_qkv: dq [N,H*E], dk, dv [N,G*E] (rows of the batch, not of the cache) -> dqkv. */
    void (*rope_qkv_backward)(Engine *e, Act *dqkv, const Tensor *dq_norm, const Tensor *dk_norm, const Act *dq, const Act *dk,
                              const Act *dv, const Act *qkv, const Tensor *q_norm, const Tensor *k_norm, float eps,
                              int plus_one, const Act *cos, const Act *sin, const int *position, int N, int H, int G, int E);

    /* dq [N,H*E], dk and dv [N,G*E] of attention over segments whose every token is in this batch; a shared segment's dk and
     * dv sum over all its descendants. P_ij = exp(s_ij - lse_i), dS = P (dout . v_j - dout . out). */
    void (*attention_backward)(Engine *e, Act *dq, Act *dk, Act *dv, const Act *dout, const Act *out, const Act *lse, const Act *q,
                               const Act *k, const Act *v, const Segment *segment, const Run *run, int n_runs, int H, int G,
                               int E, float scale, int window);

    void (*gated_backward)(Engine *e, Act *dgate_up, const Act *dout, const Act *gate_up, int N, int F, bool gelu);

    /* logp[i] = log softmax(logits[i,:])[target[i]], logits F32; and its gradient, in the logits' place: dlogits = dlogp (onehot - softmax) */
    void (*token_logprob)(Engine *e, float *logp, const Act *logits, const int *target, int n, int V);
    void (*token_logprob_backward)(Engine *e, Act *logits, const float *logp, const float *dlogp, const int *target, int n, int V);

    /* mse[i] = mse_nrm(x[i,:], gold[i,:], D, scale), below, summed in fp64, and dx = weight * its gradient (dx NULL: not wanted),
     * dmse_i/dx_i = -2 scale^2/D (gold_i / |x_i||gold_i| - cos x_i / |x_i|^2), 0 where either is zero.
     * x, dx [n,D], gold [n,D] F32; mse [n] on the host, NaN when the engine has failed */
    void (*mse_nrm)(Engine *e, double *mse, Act *dx, const Act *x, const Act *gold, int n, int D, double scale, double weight);

    double (*sum_squares)(Engine *e, const Act *x, size_t count);

    /* One AdamW step over flat memory: g scaled by `g_scale` (clipping), m = b1 m + (1-b1) g, v = b2 v + (1-b2) g^2,
     * w -= lr (m / (1-b1^t) / (sqrt(v / (1-b2^t)) + eps) + decay w). Weights and moments F32, or BF16 rounded stochastically by
     * numbers keyed by (key, element). Source: torch.optim.AdamW. */
    void (*adamw)(Engine *e, void *w, DType weights, const Act *g, void *m, void *v, DType moments, size_t count, const AdamW *how,
                  float lr, int64_t step, float g_scale, uint64_t key);
};

/* The CPU engine for this processor: the widest of the builds of cpu.c that it can run (AVX-512 BF16, AVX-512, AVX2, any).
 * threads 0 = all. Fails when bf16_dot is asked of a processor without it. NLA_CPU=avx512|avx2|any picks a narrower one. */
Engine *engine_open(int threads, bool bf16_dot, Err *err);
void memory_count(MemoryUse *m, MemoryKind kind, size_t more, size_t less); /* an engine tells what it has taken or given back */
double proc_bytes(const char *path, const char *field); /* what a file such as /proc/self/status says in kB; 0 where it does not */
size_t host_available(void); /* bytes of the machine's memory that could be had now; 0: nobody knows */

#ifdef NLA_CUDA
/* The CUDA engine on the first GPU (kernels.cu), activations in bf16 or, for diffing, in fp32. Fails when the driver, a GPU or the
 * cuBLASLt library is missing, and says which. */
Engine *engine_open_cuda(DType act, Err *err);
bool cuda_present(void); /* there is a driver and a GPU */
#endif

/* safetensors_save of tensors some of which may be memory of the engine. */
int engine_save(Engine *e, const char *path, const Tensor *tensor, int n, Err *err);

/* ------------------------------------------------------------------------------------------------ the model */

typedef struct {
    Tensor attn_in_norm;  /* input_layernorm */
    Tensor attn_out_norm; /* Gemma: post_attention_layernorm, before the residual add */
    Tensor mlp_in_norm;   /* post_attention_layernorm; Gemma: pre_feedforward_layernorm */
    Tensor mlp_out_norm;  /* Gemma: post_feedforward_layernorm */
    Tensor q_norm, k_norm;
    Linear qkv, o, gate_up, down;
} Block;

enum { MODULES = 7 }; /* matrices of a block: q, k, v, o, gate, up, down */

typedef struct {
    int rank;
    double alpha;
    bool rslora;          /* scale alpha / sqrt(rank) instead of alpha / rank */
    bool module[MODULES]; /* which matrices of every block */
    char *base;           /* owned: base_model_name_or_path, or NULL */
} LoraConfig;

typedef struct {
    Config config;
    Safetensors files;
    char *dir;
    LoraConfig lora;   /* rank 0: no adapters */
    Tensor embed;      /* [V,D] */
    Tensor final_norm; /* data NULL when absent (an AR has none) */
    Linear lm_head;    /* n = 0 when absent */
    Block *block;      /* [L] */
    Engine *engine;    /* borrowed */
    const char *prefix; /* of the tensors' names in the files: "model." or a wrapper's */
    uint16_t *made;     /* random weights, when they come from no file; else NULL */
    size_t made_bytes;
} Model;

/* Maps DIR's weights and checks every tensor's presence and shape against config.json, by name. */
int model_load(Model *model, const char *dir, Engine *engine, Err *err);
void model_free(Model *model);
/* A model of that configuration (taken) with random weights, bf16, in memory: for measuring. dir: its name in messages; head: with
 * final norm and lm_head. */
int model_make(Model *model, Config *config, const char *dir, bool head, uint64_t seed, Engine *engine, Err *err);
size_t config_weights(const Config *c, bool head); /* bytes of them, without making any */
/* Bytes of the working copies of a model's weights, and of `head` (may be NULL), that its engine makes. masters: format of what trains
 * (all weights, or the adapters when it has some); DT_OTHER: nothing does. */
size_t model_copies(const Model *model, const Linear *head, DType masters);
size_t model_parameters(const Model *model);
/* Bytes that its weights take as an engine of its own memory keeps them: in `act`, the blocks' matrices in `format` (norms in fp32). */
size_t model_bytes(const Model *model, DType act, WeightFormat format);
/* A model's tensors under the names that their files give them (stb; named_free): of the model itself (a tied head once, as the
 * embedding), and of its adapters under PEFT's names. */
typedef struct {
    char *name;
    Tensor *tensor;
} Named;
Named *model_tensors(Model *m);
Named *lora_tensors(Model *m);
void named_free(Named *list);

Linear *block_linear(Block *b, int module, int *place); /* the stack that holds one, and its place there */
const char *module_name(int module);                    /* "self_attn.q_proj" */
Tensor *lora_down(const Linear *w, int place);          /* the adapter's [R,I] of that matrix; NULL: it has none */

typedef enum { FORWARD, TRAINING, TRAINING_RECOMPUTED } Passes;

/* What a training pass keeps of a block for the way back: the stream into it and after its attention, and what its products
 * gave ([N, ...]; attn_out and mlp_out only where norms follow them). */
typedef struct {
    Act *in, *qkv, *att, *lse, *attn_out, *mid, *gate_up, *mlp_out;
} Kept;

/* Key/value cache and working memory for passes over one forest. */
typedef struct {
    Model *model;
    int blocks;             /* how many blocks are run: L, or K+1 when only the residual stream at K is wanted */
    int max_rows;           /* largest batch */
    int cache_rows, used;   /* rows of the cache, rows given to segments */
    Segment *segment;       /* stb */
    Act **k, **v;           /* [blocks], each [cache_rows, G*E]; segments start at multiples of CACHE_ALIGN rows */
    Act *cos[2], *sin[2];   /* [max position, E/2], F32, for global and local RoPE */
    int n_positions;
    Act *x, *xn, *qkv, *q, *att, *proj, *gate_up, *gated, *low; /* [max_rows, ...] */
    Act *logits;            /* [LOGIT_ROWS, V], F32 */
    Kept *kept;             /* [blocks + 1], of the last only `in`: the stream at the end. NULL: there is no way back */
    Act *dx, *dxn, *dproj, *dgated, *dgate_up, *dqkv, *dq, *datt, *dk, *dv, *dlow;
    Act **memory;           /* stb: all of them */
    int *position, *cache_row;
    size_t bytes;           /* all of the above */
} Forest;

enum {
    LOGIT_ROWS = 128, /* logits are made this many rows at a time, never for a whole batch */
    CACHE_ALIGN = 16, /* rows: lets an engine keep keys in blocks of up to 16 */
    MAX_DEPTH = 64    /* ancestors of a segment, itself included */
};

/* A forest of up to cache_rows tokens in all, batches of up to max_rows, running blocks 0..blocks-1. With TRAINING every block
 * keeps what its gradient needs, with TRAINING_RECOMPUTED only the stream: each block then runs once more on the way back. */
int forest_open(Forest *forest, Model *model, int blocks, int cache_rows, int max_rows, Passes passes, Err *err);
void forest_close(Forest *forest);
void forest_cut(Forest *forest, int segments); /* forgets all but the first `segments`, keeps the memory */
/* A new empty segment with room for `cap` tokens; its index, or -1 when the cache is full or the position too large. */
int forest_add(Forest *forest, int parent, int cap, Err *err);
/* Bytes a forest of that size takes, without making it (for --plan and inspect). */
size_t forest_bytes(const Model *model, int blocks, int cache_rows, int max_rows, Passes passes);

/* Tokens to append to segments of a forest: rows of one forward pass. Zero it before use. */
typedef struct {
    int *token;   /* stb [N] */
    Run *run;     /* stb, parents before children */
    int *out_row; /* stb: rows whose logits are wanted, ascending */
    struct {
        int row;
        const float *vector; /* [D], borrowed until the forward pass */
    } *inject;    /* stb: rows whose embedding is replaced, after the embedding's scale */
} Batch;

void batch_clear(Batch *batch);
void batch_inject(Batch *batch, int row, const float *vector);
void batch_free(Batch *batch);
/* Appends n tokens to segment `seg`; want_logits: 0 none, 1 of the last token, 2 of all. */
void batch_add(Batch *batch, const Forest *forest, int seg, const int *token, int n, int want_logits);

/* ---- adapters, in PEFT's layout (adapter_config.json, adapter_model.safetensors); model_free takes them off */

double lora_scale(const LoraConfig *c);
int lora_modules(LoraConfig *c, const char *list, Err *err);    /* "q,v" or "q_proj,v_proj" -> module[] */
void lora_new(Model *m, const LoraConfig *c, uint64_t seed);    /* A random, B zero: they change nothing yet. m->lora = *c */
int lora_load(Model *m, const char *dir, Err *err);
int lora_save(Model *m, const LoraConfig *c, const char *dir, Err *err);
void lora_free(Model *m);
/* A model directory, or an adapter's: its base (as named, or beside the adapter) with the adapter on it. blocks > 0: only that many. */
int adapted_load(Model *m, const char *dir, int blocks, Engine *engine, Err *err);

/* What happens along a forward pass, for capture, dump and parity. `seen` gets every module's output, [rows, width], still
 * in the engine. Modules carry HF's names: "model.embed_tokens", "self_attn", "mlp" and "" (the block itself: the residual
 * stream after it) with their layer, "model.norm", "lm_head"; layer is -1 outside the blocks. */
typedef struct {
    void *context;
    void (*seen)(void *context, Engine *engine, const char *module, int layer, const Act *data, int first_row, int rows,
                 int width); /* first_row: of the batch, or for model.norm and lm_head of out_row */
} Tap;

/* Receives the logits of the wanted rows, in order, up to LOGIT_ROWS at a time: logits [n,V] (in the engine, valid during
 * the call) belong to out_row[first .. first+n). */
typedef struct {
    void *context;
    void (*rows)(void *context, Engine *engine, const Act *logits, int first, int n);
} LogitSink;

/* Runs the batch: appends its tokens to the forest's segments, and hands the wanted rows' logits to `logits` and the
 * intermediates to `tap` (either may be NULL). Fails before any change when the batch does not fit (rows, capacity, token
 * ids outside the vocabulary, no lm_head for logits). Formulas: the modelling files of transformers, see model.c. */
int model_forward(Forest *forest, const Batch *batch, const LogitSink *logits, const Tap *tap, Err *err);

/* What a loss makes of the log-probabilities of the wanted rows' targets, up to LOGIT_ROWS at a time, in order: it writes
 * dlogp = dloss/dlogp. Cross entropy is dlogp = -1 / tokens; GRPO and its KL are another function of logp. */
typedef struct {
    void *context;
    void (*tokens)(void *context, const float *logp, float *dlogp, int first, int n);
} TokenLoss;

/* The way back, after a model_forward over a training forest. `grad` is a Model of the same shape whose tensors are the
 * gradients (F32, added to; data NULL = does not train).
 * model_token_loss: final norm, lm_head and loss of out_row, LOGIT_ROWS at a time; target [out_row]: the token that follows
 * each. Writes forest->dx, the gradient of the stream after the last block (zero elsewhere).
 * model_backward: from forest->dx down to the embeddings. Every segment must stand whole in this one batch. */
void model_token_loss(Forest *forest, const Batch *batch, const int *target, const TokenLoss *loss, const Model *grad);
void model_backward(Forest *forest, const Batch *batch, const Model *grad);

/* ------------------------------------------------------------------------------------------------ sampling */

typedef struct {
    float temperature; /* 0 = greedy */
    int top_k;         /* 0 = all */
    float top_p;       /* 1 = all */
    uint64_t seed;
} Sampler;

/* A hash of four integers (XXH3), and a uniform number in [0,1) from it: a row's draw never depends on its neighbours. */
uint64_t random_key(uint64_t seed, uint64_t a, uint64_t b, uint64_t c);
double random_uniform(uint64_t seed, uint64_t a, uint64_t b, uint64_t c);

/* ------------------------------------------------------------------------------------------------ data */

/* Documents, one at a time: from JSONL (`text` field, or `prompt`), plain text (a file is one document), a directory of
 * text files (sorted by name) or "-" (stdin: JSONL when the first byte is '{', else lines). Gzip by name (.gz), through a pipe. */
typedef struct Corpus Corpus;
typedef struct {
    char *id;   /* `doc_id`/`id` of the row, else the file name or line number */
    char *text; /* UTF-8, maybe invalid */
    size_t len;
} Document;
Corpus *corpus_open(const char *path, Err *err);
int corpus_next(Corpus *corpus, Document *doc, Err *err); /* 1 a document (borrowed until the next call), 0 the end, -1 */
double corpus_fraction(const Corpus *corpus); /* how much of it has been read, 0 to 1; -1 when nobody can know (stdin) */
void corpus_close(Corpus *corpus);

/* What a reader would say a model has in mind at the end of `text`, from the words alone: subject, register and topic; the
 * construction still open, the last words quoted (4 to 14, a seventh of `words`); the last token, its role and what may follow. Three
 * paragraphs of plain prose with a blank line between, of at most `words` words if what matters most fits into them (RULES_WORDS: 60 to 106 for most
 * texts), at most 3,000 bytes of the end read; to be freed. NULL when there are fewer than five words: too little to say. `key` varies
 * the wording; the same text, words and key give the same bytes. Any bytes may come in; UTF-8 goes out, without the tags of an
 * explanation. Safe to call from several threads. */
enum { RULES_WORDS = 106 };
char *rules_explanation(const char *text, size_t len, int words, uint64_t key);

/* Writer of a dataset directory (README, "Files"): rows are appended, the directory appears under its name when
 * dataset_finish succeeds. */
typedef struct DatasetWriter DatasetWriter;
/* A row's id: XXH3 of "doc_id#n_raw_tokens". (As the seed of the hash the number would be mixed into short ids too weakly.) */
uint64_t row_id_of(const char *doc_id, int64_t n_raw_tokens);
DatasetWriter *dataset_create(const char *dir, int d_model, Err *err);
/* The same in a directory that the caller renames: goes on after `rows` rows, whose JSON took text_bytes (dataset_sync told), and
 * leaves what it wrote when it fails. `columns`: the path of a file beside it, which the caller removes in the end. */
DatasetWriter *dataset_continue(const char *dir, const char *columns, int d_model, int64_t rows, int64_t text_bytes, Err *err);
int dataset_append(DatasetWriter *w, const float *activation, int64_t n_raw_tokens, uint64_t row_id, const char *doc_id,
                   const char *text, size_t text_len, const char *explanation, Err *err); /* explanation NULL: there is none */
int dataset_sync(DatasetWriter *w, int64_t *text_bytes, Err *err);
/* Frees w either way. Sets row_count, dataset_id, extraction.norms, var_nrm and suggested_injection_scale in the sidecar. */
int dataset_finish(DatasetWriter *w, Yaml *sidecar, Err *err);
void dataset_abandon(DatasetWriter *w);                        /* removes what was written */

/* ------------------------------------------------------------------------------------------------ sidecars
 * nla_meta.yaml of an AV, an AR or a dataset (docs of the format: README). Strings point into `yaml`. */

typedef struct {
    Yaml *yaml; /* all of it, unknown keys too */
    char *path;
    bool dataset, av, ar;
    int d_model;
    int layer;                /* K: the residual stream after block K; -1 when not said */
    bool has_injection_scale; /* false: must be given on the command line */
    float injection_scale;    /* length of the injected vector; 0 = as it is (null) */
    float mse_scale;          /* s of n_s(x) = s x / |x| */
    const char *marker;       /* injection_char, NULL when not said; ids -1 when not said */
    int marker_id, left_id, right_id;
    int *suffix_ids;          /* stb: critic_suffix_ids */
    const char *av_template, *ar_template; /* NULL when not said */
} Sidecar;

extern const char default_av_template[], default_ar_template[];

/* path: the file, or a directory that holds nla_meta.yaml. Old and new keys (actor/critic, av/ar). */
int sidecar_load(Sidecar *s, const char *path, Err *err);
void sidecar_free(Sidecar *s);
/* Compares what the sidecar says with the live tokenizer and model: width, marker, neighbours, suffix, an AR's number of
 * blocks. A mismatch is an error that names both sides. */
int sidecar_check(const Sidecar *s, const Tokenizer *tok, const Config *config, const char *dir, Err *err);
/* The AV prompt as ids (stb), and where the marker stands in it (exactly one match with its neighbours). */
int sidecar_prompt(const Sidecar *s, const Tokenizer *tok, const char *date, int **ids, int *marker_at, Err *err);
/* Appends the ids of the AR template filled with text, special tokens added, the fixed suffix checked. */
int sidecar_text_ids(const Sidecar *s, const Tokenizer *tok, const char *text, size_t len, int **ids, Err *err);
/* A character that is one token by itself and stands alone in the AV prompt: U+3200-U+33FF, then other rare ranges. To be
 * freed; NULL when the vocabulary has none. */
char *marker_choose(const Tokenizer *tok, const char *av_template);
/* The sidecar of a new AV or AR over `base`: our templates, with ids computed by this tokenizer. */
int sidecar_make(Yaml **out, bool ar, const Tokenizer *tok, const Config *config, const char *base, int layer,
                 float injection_scale, Err *err);

/* A dataset directory, or a .safetensors file of vectors alone; mapped, so half a million rows cost nothing until read. */
typedef struct {
    char *path;
    Safetensors st;
    const Tensor *vectors; /* activation_vector [n, d_model], F32 or BF16 */
    const int64_t *n_raw_tokens; /* [n]: tokens of the prefix; NULL: not there */
    const uint64_t *row_id;      /* [n]; NULL: not there */
    int64_t n;
    int d_model;
    File rows;    /* rows.jsonl */
    size_t *line; /* stb [n + 1]: where each row starts; NULL: there are no rows */
    bool has_meta;
    Sidecar meta;
} Dataset;
int dataset_open(Dataset *d, const char *path, Err *err);
void dataset_close(Dataset *d);
void dataset_vector(const Dataset *d, int64_t row, float *out);            /* fp32 [d_model] */
/* For a reader that goes through all rows in order, called at each: gives back the memory of those before, so that the process
 * stays as small on a large dataset as on a small one. */
void dataset_passed(const Dataset *d, int64_t row);
int dataset_row(const Dataset *d, int64_t row, Json *json, Err *err); /* the row's JSON object; json_free is the caller's */

/* Of the vectors that are finite and not zero; var_nrm as in Scores. */
typedef struct {
    double mean, deviation, least, low, median, high, most; /* of |v|; low and high: 1% and 99% */
    double var_nrm;
    int64_t zero, not_finite;
} Norms;
void dataset_norms(const Dataset *d, Norms *out);

/* ---- the stages: rows from one dataset to the next (stages.c), and their explanations (writers.c) */

typedef struct {
    char *doc_id, *text, *explanation; /* owned; explanation NULL: there is none */
    size_t text_len;
    int64_t n_raw_tokens;
    uint64_t id, prefix; /* the row's id; XXH3 of its text */
} Row;
int row_open(Row *r, const Dataset *d, int64_t row, Err *err);
void row_close(Row *r);
int rows_open(Dataset *d, const char *path, Err *err); /* dataset_open of a directory with rows and a sidecar; not an empty one */
void dataset_tell(const Settings *s, const char *dir, const Yaml *sidecar); /* prints rows, bytes, norms */

/* ExplanationIndex on disk: JSONL of {"row_id" or "prefix": 16 hex digits, "explanation", "by"}, several files separated by commas; of two
 * for one row the first counts. */
typedef struct {
    int file;
    size_t at;
} ExplanationPlace; /* of a line */
typedef struct {
    uint64_t key; /* row id or prefix */
    ExplanationPlace value;
} ExplanationMap;
typedef struct {
    File *file; /* stb */
    ExplanationMap *place; /* stb map */
} ExplanationIndex;
int explanations_open(ExplanationIndex *e, const char *paths, Err *err);
void explanations_close(ExplanationIndex *e);
/* The row's explanation, by its id or its prefix's hash, to be freed as *by is (who wrote it; "file" when it does not say); NULL: none. */
char *explanation_find(const ExplanationIndex *e, const Row *row, char **by, Err *err);
uint64_t map_key(uint64_t hash); /* 62 bits of it: stb_ds's own hash of eight bytes shifts the other two into a sign bit */
/* An explanation as a writer wrote it -> two or more paragraphs separated by a blank line, to be freed: what stands between its tags
 * when it has them; list marks, emphasis and headings taken off. NULL: it cannot be used, *why says for which reason. */
char *explanation_clean(const char *text, size_t len, const char **why);

/* ------------------------------------------------------------------------------------------------ decoding
 * A prompt is one segment without its last token; each sample is a child that starts with that token. So a prompt is
 * computed once for all its samples, and every step is the same: each live sample appends one token and gets logits. */

typedef struct {
    Sampler sampler;
    int max_tokens;
    bool ignore_eos;
    bool whole; /* verbalize: to the end token, as in training, not only to the closing tag */
} Decoding;

typedef struct {
    int row, sample; /* keys of its random numbers: which prompt or vector, which of its samples */
    int seg;
    int next;        /* the token to feed at the next step */
    int *ids;        /* stb: drawn so far, without the end token */
    char *text;      /* stb: their bytes, special tokens left out, no NUL at the end */
    float *logprob;  /* stb: of every drawn token, the end token included */
    bool done;
    bool ended;      /* at an end token */
    bool stopped;    /* at the stop string; neither: at the length cap */
} Sample;

typedef struct {
    Decoding how;
    const int *eos;       /* stb */
    const char *stop;     /* a text that ends a sample when it has been written; may be NULL */
    const Tokenizer *tok; /* NULL: only ids are wanted */
    int vocab_size;
    Sample *sample;       /* stb */
    int *live;            /* stb: indices of those still growing, in batch order */
    void (*token)(void *context, const Sample *s, const char *bytes, size_t n); /* after each drawn token; may be NULL */
    void *context;
} Decoder;

/* Runs tokens of one segment through the model, as many rows at a time as the forest has working memory for. */
int feed(Forest *f, Batch *b, int seg, const int *ids, int n, const Tap *tap, Err *err);
/* Adds samples that continue segment `parent` (or none) with the token `last`. `row` keys the random numbers. */
int decoder_add(Decoder *d, Forest *f, int parent, int row, int last, int samples, Err *err);
/* The samples of n prompts (stb ids each), which continue segment `parent` (-1: none): each prompt but its last token becomes a
 * segment, many of them in one pass. Prompt i draws its random numbers as row first_row + i. */
int decoder_prompts(Decoder *d, Forest *f, Batch *b, int parent, int *const *prompt, int n, int first_row, int samples, Err *err);
/* Steps until every sample is done; finished samples leave the batch at once. Returns the number of rows computed, or -1. */
int64_t decode(Decoder *d, Forest *f, Batch *b, Err *err);
double sample_logprob(const Sample *x); /* of all it drew */
void decoder_free(Decoder *d);

/* ------------------------------------------------------------------------------------------------ AV and AR */

typedef struct {
    Model model;
    Tokenizer *tok;
    Sidecar meta;
    int *prompt;    /* stb: the AV prompt */
    int marker_at;  /* where the vector goes */
    float scale;    /* length it is given; 0 = as it is */
    Forest forest;  /* segment 0: the prompt up to the marker */
    Batch batch;
    int64_t computed, flat; /* prompt tokens computed, and what one prompt a sample would have been */
} Verbalizer;

/* An AV directory; `sidecar` (may be NULL) names another sidecar than its own; scale NaN takes the sidecar's. */
int verbalizer_open(Verbalizer *v, const char *dir, const char *sidecar, double scale, Engine *engine, Err *err);
void verbalizer_close(Verbalizer *v);
void verbalizer_renew(Verbalizer *v); /* after its weights have changed: what it keeps of the prompt is computed anew */
/* Decodes `samples` texts for each of n vectors [n,D]; they stand in d->sample, vector by vector. A text stops at
 * </explanation> or at an end token. Row i draws its random numbers as row first_row + i. A zero or non-finite vector is
 * an error that names its row. d is the caller's to free, also after an error. */
int verbalize(Verbalizer *v, Decoder *d, const float *vectors, int n, int64_t first_row, int samples, const Decoding *how,
              Err *err);
/* Bytes of its forest for that many vectors, samples of each and tokens of each sample. */
size_t verbalizer_bytes(const Verbalizer *v, int vectors, int samples, int max_tokens);
/* out = v scaled to length `scale` (0: as it is), the length taken in fp64; fails on a zero or non-finite v, naming the row. */
int scaled_vector(float *out, const float *v, int d, float scale, int64_t row, Err *err);
/* What stands between <explanation> and </explanation>, trimmed; false when a tag is missing or nothing is there. */
bool explanation_of(const char *text, size_t len, const char **start, size_t *n);

typedef struct {
    Model model;
    Tokenizer *tok;
    Sidecar meta;
    Safetensors head_file;
    Linear head;    /* value_head [D,D] */
    int *start;     /* stb: the ids that every filled template starts with */
    int *end_row;   /* stb: each text's last row in the batch */
    Forest forest;  /* segment 0: those ids */
    Batch batch;
    Act *last, *out; /* [texts, D] */
} Reconstructor;

int reconstructor_open(Reconstructor *r, const char *dir, const char *sidecar, Engine *engine, Err *err);
void reconstructor_close(Reconstructor *r);
/* DIR/value_head.safetensors, mapped in *file (the caller's to close, also after an error past its opening), as *head [D,D]. */
int value_head_load(Linear *head, Safetensors *file, const char *dir, int D, Err *err);
bool ar_shares_start(const Reconstructor *r, const int *ids); /* stb ids of a filled template: do they begin with r->start? */
/* Vectors [n,D] of n texts: value_head applied to the residual stream after the last block at the template's last token. */
int reconstruct(Reconstructor *r, const char *const *text, const size_t *len, int n, float *out, Err *err);

size_t reconstructor_bytes(const Reconstructor *r); /* of its forest and vectors, for texts of ordinary length */

/* Scores. n_s(x) = s x / |x|; mse_nrm = mean (n_s(pred) - n_s(gold))^2 = 2 (1 - cos) for s = sqrt(d). */
double cosine(const float *a, const float *b, int d); /* 0 when either is zero */
double mse_nrm(const float *pred, const float *gold, int d, double mse_scale);
double vector_norm(const float *v, int d);
int by_value(const void *a, const void *b); /* qsort: doubles, ascending */

/* The golds that FVE's denominators are computed on, one at a time. Zero it before use. */
typedef struct {
    double *sum; /* [d]: of v / |v| */
    int64_t n;
} Baseline;
void baseline_add(Baseline *b, const float *v, int d);
double baseline_var(const Baseline *b, int d); /* var_nrm for s = sqrt(d): mean |n_s(v) - mean n_s|^2 / d */
void baseline_free(Baseline *b);

/* ------------------------------------------------------------------------------------------------ training */

/* What trains, as flat memory: the weights (the model's tensors point into them), fp32 gradients, AdamW's moments. */
typedef struct {
    Engine *engine;
    Named *tensor;      /* stb: in the model */
    size_t *offset;     /* stb: of each in the flat memory */
    size_t count, bytes;
    Act *weight, *grad;
    Act *m, *v;
    DType weights, moments; /* F32, or BF16 rounded stochastically */
    Model gradient;     /* the model's shape; its tensors are the gradients */
    Linear head;        /* of the value head, when there is one */
    int64_t step;       /* updates made */
} Params;

/* Trains `model`'s adapters when `lora`, else all its weights; and `head` (may be NULL) as value_head.weight. */
int params_open(Params *p, Model *model, bool lora, Linear *head, DType weights, DType moments, Err *err);
size_t params_bytes(const Model *model, bool lora, const Linear *head, DType weights, DType moments); /* the same, without making it */
void params_close(Params *p);

typedef struct {
    AdamW adamw;
    double peak, final; /* learning rates */
    int warmup, total;  /* steps; total 0: constant after the warm-up */
    double clip;        /* of the gradient's norm; 0 = none */
    uint64_t seed;
} Schedule;
/* Of step 1, 2, ...: linear to `peak` over the warm-up, then a cosine to `final` at `total`. */
double learning_rate(const Schedule *s, int64_t step);
/* One AdamW update by what the gradients hold, which are then zeroed. *norm: theirs before clipping. A norm that is not finite
 * changes nothing and returns false. */
bool params_step(Params *p, const Schedule *s, double *norm);

/* Responses that the AV has to have drawn, one group a vector. */
typedef struct {
    const float *vector;     /* [D], as in the dataset */
    int64_t row;             /* for messages */
    const int *const *token; /* [samples]: each response's ids, the end token included when there was one */
    const int *length;       /* [samples] */
    int samples;
} AvGroup;

/* Forward and back over groups of one microbatch: the prompt up to the marker once, marker and tail once a vector, the
 * responses as children. `loss` sees all responses' tokens in order. With `grad` NULL only log-probabilities are computed. */
typedef struct {
    Verbalizer *av; /* borrowed; its own forest is for decoding */
    Forest forest;
    Batch batch;
    int *target;    /* stb */
    Passes passes;
} AvPass;
int av_pass(AvPass *p, const AvGroup *group, int groups, const TokenLoss *loss, const Model *grad, Err *err);
void av_pass_close(AvPass *p);
size_t av_pass_bytes(const Verbalizer *av, int groups, int responses, int tokens, Passes passes); /* tokens: of all responses */
/* The response that a training row teaches: the explanation between its tags and the chat's end-of-turn token. */
int av_response(const Verbalizer *av, const char *explanation, size_t len, int **ids, Err *err);
int av_end_of_turn(const Verbalizer *av); /* -1 when the prompt's template has none that the tokenizer knows */

/* The AR's loss weight * mse_nrm summed over n texts, forward and back: gold [n,D], mse [n] is written, gradients are added to `params`'
 * (NULL: forward alone). */
typedef struct {
    Reconstructor *ar; /* borrowed */
    Forest forest;
    Batch batch;
    int *end_row;      /* stb */
    Act *last, *out, *dout, *gold; /* [texts, D]; gold F32 */
    int room;          /* texts that they hold */
    Passes passes;
} ArPass;
int ar_pass(ArPass *p, const char *const *text, const size_t *len, const float *gold, int n, double weight, double *mse,
            const Params *params, Err *err);
void ar_pass_close(ArPass *p);
size_t ar_pass_bytes(const Reconstructor *ar, int texts, int tokens, Passes passes); /* tokens: of all texts, the shared start once */

/* r = -mse_nrm (failed: -2), or -log(mse_nrm) (failed: -log 2), less length_penalty a token. */
typedef struct {
    bool log;
    double length_penalty;
} Reward;
double reward_of(const Reward *how, bool explained, double mse, int tokens);

/* GRPO on one group: rewards to advantages, (r - mean) / (std + 1e-6), std with n - 1; all 0 when they are equal. */
void advantages(const double *reward, int n, double *advantage);
/* One token's share of the loss: max(-rho A, -clip(rho) A) + kl * k3, and its derivative with respect to logp. */
typedef struct {
    double clip;   /* 0.2 */
    double kl;     /* coefficient */
    int estimator; /* of the KL: 3 = k3, 2 = (logp - ref)^2 / 2, 1 = logp - ref */
} Grpo;
double grpo_token(const Grpo *g, double logp, double old, double ref, double advantage, double *policy, double *kl, double *dlogp);

/* A TokenLoss's context over a pass's tokens in order (microbatch by microbatch: `at` moves on). */
typedef struct {
    Grpo how;
    const float *old, *ref; /* [tokens]: log-probabilities when drawn, and of the frozen SFT AV */
    const float *advantage; /* [tokens]: of each token's sample */
    const float *weight;    /* [tokens]: 1 / (samples * tokens of its sample) */
    int at;                 /* tokens of earlier microbatches */
    double policy, kl;      /* sums so far */
    double apart;           /* largest |logp - old|: before the first update on a set of texts, rounding alone */
} GrpoLoss;
void grpo_tokens(void *context, const float *logp, float *dlogp, int first, int n);

/* A TokenLoss's context that only keeps the log-probabilities. */
typedef struct {
    float *logp; /* [tokens] */
    int at;
} KeepLogprobs;
void keep_logprobs(void *context, const float *logp, float *dlogp, int first, int n);

/* ---- a training run (run.c) and what it keeps on disk (checkpoint.c) */

typedef enum { STAGE_AV, STAGE_AR, STAGE_RL } Stage;

typedef struct { /* one field a key of a run file, of that name */
    char *out, *av, *ar, *data, *eval, *masters, *moments, *lora_modules;
    int steps, batch, vectors, samples, micro, warmup, lora_rank, max_tokens, kl_estimator, updates, eval_every, eval_rows,
        save_every, keep, seed;
    double lr, lr_final, ar_lr, clip, weight_decay, lora_alpha, kl, clip_ratio, length_penalty;
    bool recompute, lora_rslora, log_mse, freeze_ar, permute;
} RunSettings;

/* From a YAML file (NULL: none), then key=value strings over it, then defaults. An unknown key is an error that names it and the
 * nearest known one. */
int run_settings_read(RunSettings *r, Stage stage, const char *config, const char *const *given, int n, Err *err);
int run_settings_save(const RunSettings *r, Stage stage, const char *path, Err *err);

extern const char *const stage_names[]; /* [3]: av, ar, rl */
enum { ALL_STAGES = 1 << STAGE_AV | 1 << STAGE_AR | 1 << STAGE_RL };
typedef struct {
    unsigned stages; /* that have it, a bit each */
    Option option;   /* of which least and most are not used */
} RunKey;
extern const RunKey run_keys[]; /* the last one's name is NULL */

void run_settings_free(RunSettings *r);

typedef struct {
    RunSettings s;
    Stage stage;
    Engine *engine;
    Verbalizer av, ref; /* ref: the AV as it was, for the KL */
    Reconstructor ar;
    bool has_av, has_ref, has_ar;
    Params av_params, ar_params; /* engine NULL: does not train */
    AvPass av_pass, ref_pass;
    ArPass ar_pass;
    Dataset data, held;
    int64_t *rows, *held_rows; /* stb: those that can be used */
    int64_t *eval_row;         /* stb: of held_rows, those of an evaluation */
    int64_t *order, epoch;     /* rows as that epoch shuffles them */
    double var_nrm;            /* of the held-out vectors, or of the data without any */
    int64_t step, skipped, best_step;
    int skipped_in_row;
    double best, spoke;
    FILE *metrics;
} TrainRun;

/* A step's numbers, by name, and its work (tokens) for the rate. */
typedef struct {
    const char *name[32];
    double value[32], work;
    int n;
} Measures;
void measure(Measures *m, const char *name, double value);

/* The run's models and data, from the checkpoint directory or, when that is NULL, from the settings. What trains is not made yet. */
int train_open(TrainRun *r, const char *checkpoint, Err *err);
int train_params(TrainRun *r, Err *err); /* makes it */
void train_close(TrainRun *r);           /* the engine too */
bool setting_of(const char *given, Stage stage); /* is key=value a setting of that stage? */

/* The memory that a run takes at the most, before train_params: in the engine's memory, and in the host's (a CPU has one). */
typedef struct {
    const char *what;
    double bytes;
    bool host;
} PlanPart;
typedef struct {
    PlanPart part[16];
    int n;
    double engine, host;
} Plan;
int train_plan(const TrainRun *r, Plan *p, Err *err);
void plan_part(Plan *p, const char *what, double bytes, bool host);
void plan_print(const Plan *p);

/* Vectors and texts of n rows. */
typedef struct {
    int n, D;
    float *vector; /* [n, D]: what the AV is shown */
    float *gold;   /* [n, D]: the rows' own; another memory only in the control that exchanges vectors */
    char **text;   /* [n] */
    size_t *len;
    int64_t *row;
} Rows;

/* What an RL step draws: texts in vector order, G each. */
typedef struct {
    int n;            /* P * G */
    Rows x;           /* the P vectors */
    Decoder d;
    int **token;      /* [n]: what was drawn, the end token included */
    int *length;
    char **text;      /* [n]: the explanation, NULL: failed or truncated */
    size_t *len;
    double *mse, *reward, *advantage;
    float *old, *ref, *advantages, *weight; /* [tokens] */
    int tokens, failed, truncated;
    AvGroup *group;   /* [P] */
} Rollouts;

/* Step r->step: of AV or AR; of RL in two halves, drawing texts and learning from them. */
int step_sft(TrainRun *r, Measures *m, Err *err);
int rl_draw(TrainRun *r, Rollouts *o, Measures *m, Err *err);
int rl_learn(TrainRun *r, Rollouts *o, Measures *m, Err *err);
void rollouts_free(Rollouts *o);

bool checkpoint_any(const char *run);
/* RUN/checkpoint-STEP, whole or not at all; older ones beyond `keep` and the best are removed. */
int checkpoint_save(TrainRun *r, Err *err);
/* The newest checkpoint's directory (to be freed), every file of it checked; NULL when there is none or it is damaged. */
char *checkpoint_latest(const TrainRun *r, Err *err);
int checkpoint_load(TrainRun *r, const char *dir, Err *err); /* step and moments; the models are opened from its directories */

/* Starts, as Hugging Face directories made anew: an AV is a sidecar beside links to the base's files; an AR is blocks
 * 0..layer with an identity head (the files that transformers needs copied, per-layer lists of config.json cut). */
int av_start(const char *dir, const char *base, const Yaml *sidecar, Err *err);
int ar_start(const char *dir, const Model *m, int layer, const Yaml *sidecar, Err *err);
/* Writes a trained model into the existing directory `dir`: its adapters in PEFT's layout when it has some, else a Hugging Face
 * directory of its weights as they are in memory, tokenizer and config from `base`; with the value head and the sidecar when
 * they are given. */
int model_write(const char *dir, const char *base, Model *m, const Linear *head, const Yaml *sidecar, Err *err);

/* ------------------------------------------------------------------------------------------------ pages to look at */

/* Writes one self-contained HTML page that shows the result of `nla explain` (its JSON). Atomic; no network; nothing in
 * the JSON can break out of the page. Fails on text that is not JSON or a path that cannot be written. */
int report_explain(const char *path, const char *json, size_t len, Err *err);
int report_eval(const char *path, const char *json, size_t len, Err *err); /* the same for `nla eval` */
/* The page of the training run in directory `run`, as far as it has come: settings.yaml, metrics.jsonl (see charts.c). A last
 * line of the metrics cut short is left out; another one that is not as it should be is an error that names file and line. */
int report_run(const char *path, const char *run, Err *err);

/* What a page is made of, beside what every page has; two parts are written one after the other. */
typedef struct {
    const char *style[2], *body, *script[2];
} Page;
int page_write(const char *path, const Page *page, const char *json, size_t len, Err *err); /* json: valid, any content */
void page_date(char date[32]); /* now, as the pages say it */

/* ------------------------------------------------------------------------------------------------ engine against engine
 * Cases of every op (verify.c), for `nla verify` and the tests: played on two engines they keep outputs that can be compared. */

typedef struct {
    const char *name;
    size_t from, n;
    double bound; /* of the difference, relative to the largest number expected */
} OpOutput;

typedef struct {
    Engine *e;      /* borrowed */
    uint64_t state; /* of the random inputs */
    float *out;     /* stb: all outputs */
    OpOutput *kept; /* stb: which is which */
    Act **memory;   /* stb: of the engine */
    void **host;    /* stb */
} OpTape;

enum { OP_SIZES = 10 };
typedef struct {
    const char *name;
    void (*play)(OpTape *t, const int *size);
    int size[OP_SIZES][6]; /* those whose first number is not 0 */
} OpCase;

extern const OpCase op_cases[]; /* the last one's name is NULL */
void op_tape_close(OpTape *t);  /* not the engine */
/* An output's largest difference relative to the largest number expected, and the two numbers; infinite where one is NaN. */
double op_difference(const OpTape *want, const OpTape *have, int output, double *expected, double *got);

/* ------------------------------------------------------------------------------------------------ the command layer
 * What the commands share: the settings a command line gives, and what most commands load. */

struct Settings {
    const char *command;
    const char **argument; /* stb: what is not an option */
    /* one field an option */
    const char *device, *model, *in, *out, *layers, *positions, *date, *system, *ids, *only, *shape, *av, *ar, *acts,
        *sidecar, *html, *train, *config, *dtype, *base, *documents, *parts, *by, *stage, *explanations, *completion, *weights;
    int positions_per_doc, min_context, words;
    int prompt_tokens, av_tokens, ar_tokens, text_tokens;
    int threads, samples, max_tokens, top_k, max_length, batch, repeat, reply, rows;
    int64_t seed;
    double temperature, top_p, injection_scale, save_every;
    bool ops, e2e, resume, plan, merge, man, json, quiet, bf16, fp32, chat, special, no_special, ignore_eos, tensors, logprobs;
};

/* What most commands work with. */
typedef struct {
    Engine *engine;
    Model model;
    Tokenizer *tok;
} Loaded;

Decoding decoding_of(const Settings *s);
int group_size(const Settings *s); /* prompts or vectors decoded together: as many as --batch has room for --samples of */
int load_all(Loaded *l, const Settings *s, bool tokenizer, Err *err); /* tokenizer: false when no text is read or printed */
void unload(Loaded *l);
int open_engine(Engine **engine, const Settings *s, Err *err);
int need(const char *value, const char *option, const Settings *s, Err *err); /* an error when the option was not given */
void note(const Settings *s, const char *format, ...) __attribute__((format(printf, 2, 3))); /* on stderr, unless quiet */
/* A progress line, once a second on a terminal (in place) and every ten seconds in a log: count and rate of `unit`, and the time left
 * when the fraction done (0 to 1) is known. `last` keeps when it spoke, zeroed by the caller; done: the closing line. */
void progress(const Settings *s, double *last, double start, double count, const char *unit, double fraction, bool done);
double now(void);                                                                          /* seconds */
/* Text to ids (appended, stb): with --chat as a user message through the chat template. */
int encode_prompt(const Loaded *l, const Settings *s, const char *text, size_t len, int **ids, Err *err);
/* TEXT of the command line, standard input for "-", or --ids, as token ids (stb). */
int prompt_ids(const Loaded *l, const Settings *s, int **ids, Err *err);

/* Layers "3", "3,7,20" or "all" (stb); NULL means two thirds of the way up. */
int parse_layers(const char *text, const Config *c, int **layers, Err *err);

/* ---- the commands: a table in help.c, by which nla.c parses and from which the manual is made */

typedef struct {
    const char *name, *usage; /* usage: what follows the name; begins with the argument when that is a path or one of some words */
    const char *summary, *details, *examples; /* details: a paragraph a line; examples: one a line */
    int (*run)(const Settings *s, Err *err);
    int least, most; /* arguments */
    unsigned heeds;  /* which common options do something here, a bit each */
    unsigned files;  /* what it reads and writes, a bit each (help.c) */
    Option option[24];
} Command;
extern const Command commands[]; /* the last one's name is NULL, as of all tables of options */
extern const Option common_options[];
const Command *find_command(const char *name); /* NULL: there is none */
bool is_first_word(const char *word);          /* of commands of two words: "data" alone is none */

/* "Did you mean": the nearest of the names that it is shown, at most two letters apart. */
typedef struct {
    const char *given;
    int apart;
    char hint[96]; /* " (did you mean NAME?)", or "" */
} Guess;
void guess(Guess *g, const char *name);

int run_capture(const Settings *s, Err *err);
int run_data_extract(const Settings *s, Err *err);
int run_data_merge(const Settings *s, Err *err);
int run_data_split(const Settings *s, Err *err);
int run_data_permute(const Settings *s, Err *err);
int run_data_stats(const Settings *s, Err *err);
int run_data_explain(const Settings *s, Err *err);
int run_data_build(const Settings *s, Err *err);
int run_init(const Settings *s, Err *err);
int run_verbalize(const Settings *s, Err *err);
int run_reconstruct(const Settings *s, Err *err);
int run_dump(const Settings *s, Err *err);
int run_inspect(const Settings *s, Err *err);
int run_tokenize(const Settings *s, Err *err);
int run_generate(const Settings *s, Err *err);
int run_explain(const Settings *s, Err *err);
int run_eval(const Settings *s, Err *err);
int run_train(const Settings *s, Err *err);
int run_export(const Settings *s, Err *err);
int run_bench(const Settings *s, Err *err);
int run_report(const Settings *s, Err *err);
int run_verify(const Settings *s, Err *err);

/* ---- measuring (shapes.c, bench_ops.c, bench_e2e.c) */

typedef struct {
    const char *name;
    int layer;          /* that is read */
    float scale;        /* of the injected vector; 0: as it is */
    const char *config; /* config.json's text */
} Shape;
/* One of the target models by name, or a model directory's (a name with a '/'). *owned: to be freed, also after an error. */
int shape_find(Shape *shape, char **owned, const char *name, Err *err);

/* What the engine reached on one large product and on one copy: the rates that floors are counted with. */
typedef struct {
    double operations, bytes; /* a second; bytes read and written */
    int product;              /* size of the matrices */
    size_t copied;            /* bytes */
} Ceilings;
int ceilings_measure(Ceilings *c, Engine *e, Err *err);
double floor_of(const Ceilings *c, double operations, double bytes); /* seconds */
int bench_ceilings(const Settings *s, Engine *e, Ceilings *c, Err *err); /* measures and prints them */
int bench_ops(const Settings *s, Engine *e, Err *err);
int bench_e2e(const Settings *s, Err *err);

/* The whole program as a function (main calls it; tests do too): runs a command line, returns the exit status. */
int nla_main(int argc, char **argv);

#ifdef __cplusplus
}
#endif
#endif
