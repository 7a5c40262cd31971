/* help.c - every command and option as one table, and what is made from it: the command line's rules (nla.c parses by it),
 * `nla help`, the man page, and completion for bash and zsh.
 */
#include "nla.h"

#include <ctype.h>
#include <stdlib.h>
#include <string.h>

#include <stb/stb_ds.h>

/* ------------------------------------------------------------------------------------------------ the table */

#define AT(field) offsetof(Settings, field)
#define FLAG(name, field, help) {name, NULL, OPTION_FLAG, AT(field), 0, 0, help}
#define TEXT(name, field, value, help) {name, value, OPTION_TEXT, AT(field), 0, 0, help}
#define COUNT(name, field, least, most, help) {name, "N", OPTION_COUNT, AT(field), least, most, help}
#define NUMBER(name, field, value, least, most, help) {name, value, OPTION_NUMBER, AT(field), least, most, help}

const Option common_options[] = {
    TEXT("device", device, "cpu|cuda", "engine to compute on (default: cuda where there is one)"),
    COUNT("threads", threads, 0, 4096, "threads of the CPU engine (default: all)"),
    FLAG("bf16", bf16, "round the inputs of matrix products to bf16 (processors with AVX512-BF16)"),
    FLAG("fp32", fp32, "activations in fp32 on a GPU too, for diffing (default there: bf16)"),
    {"seed", "N", OPTION_SEED, AT(seed), 0, 0, "of everything random (default: 0)"},
    FLAG("json", json, "results as JSON, one object or array a line"),
    FLAG("quiet", quiet, "no progress or timing on stderr"),
    TEXT("weights", weights, "int8|fp8", "the blocks' matrices as one byte a weight and a scale an output"),
    {0},
};
/* Which of them a command heeds. All take all of them, so that a script may give them everywhere. */
enum { TRAINING_ENGINE = 1 | 2 | 4 | 8, SEED = 16, JSON = 32, QUIET = 64, ENGINE = TRAINING_ENGINE | 128 };

/* What commands read and write. */
static const char *const files[][2] = {
    {"model directory",
     "as Hugging Face lays it out: config.json, model.safetensors (or the shards that model.safetensors.index.json names; bf16, f16 "
     "or f32), tokenizer.json, and tokenizer_config.json for the chat template. Families: Llama 3 (SmolLM2 too), Qwen2.5, Qwen3, Gemma 3."},
    {"AV, AR",
     "a model directory, or adapters as PEFT writes them (adapter_config.json, adapter_model.safetensors), with nla_meta.yaml, the "
     "sidecar: layer, marker token, templates, length of the injected vector. An AR ends at its layer and has value_head.safetensors."},
    {"dataset",
     "a directory: activations.safetensors with activation_vector [rows, width] (f32 or bf16), n_raw_tokens (tokens of the prefix) and "
     "row_id; rows.jsonl with doc_id, n_raw_tokens, text (the prefix) and, when somebody wrote one, explanation; nla_meta.yaml."},
    {"documents",
     "JSONL (.jsonl, .ndjson, .json) with \"text\" (or \"prompt\") and, if there is one, \"doc_id\" (or \"id\") a line; any other file "
     "is one document; of a directory all its files, by name; - is standard input: JSONL when it begins with {, else a document a "
     "line. What ends in .gz is unpacked."},
    {"explanations", "JSONL with row_id or prefix (16 hex digits: the row's id, the XXH3-64 of its text), explanation, and by (who wrote it)."},
    {"run", "a directory: settings.yaml; metrics.jsonl, an object a step (loss or reward, fve, kl, lr and more) or evaluation; checkpoint-STEP with av/ and ar/, as far as they "
            "are trained, the optimizer's moments and checksums."},
};
enum { FILES = sizeof files / sizeof *files };
enum { MODEL_DIR = 1, PAIR = 2, DATASET = 4, DOCUMENTS = 8, EXPLANATIONS = 16, RUN = 32 }; /* those of a command, a bit each */

#define MODEL_OPTION TEXT("model", model, "DIR", "the model directory")
#define LAYER_OPTION TEXT("layer", layers, "K", "a layer, several (3,7,20) or all (default: two thirds of the way up)")
#define OUT_OPTION TEXT("out", out, "DIR", "the dataset to make")
#define MAX_LENGTH_OPTION COUNT("max-length", max_length, 1, 1e6, "tokens of a document that are run, at most (default: 2048)")
#define BATCH_OPTION COUNT("batch", batch, 1, 65536, "texts decoded together (default: 32)")
#define SIDECAR_OPTION TEXT("sidecar", sidecar, "FILE", "another nla_meta.yaml than its own")
#define SCALE_OPTION NUMBER("injection-scale", injection_scale, "X", 0, 1e30, "another length of the injected vector than the sidecar's")
#define RESUME_OPTION(help) FLAG("resume", resume, help)
#define IDS_OPTION TEXT("ids", ids, "LIST", "token ids instead of the text, such as 1,22,333")
#define CHAT_OPTIONS                                                                                                                  \
    FLAG("chat", chat, "the text is a user message: render it with the model's chat template"),                                       \
        TEXT("system", system, "TEXT", "system message before it (with --chat)"),                                                     \
        TEXT("date", date, "DATE", "the date that Llama 3.1's template names (default: \"26 Jul 2024\")")
#define SAMPLING_OPTIONS                                                                                                              \
    COUNT("max-tokens", max_tokens, 1, 1e6, "longest text drawn, in tokens (default: 200)"),                                          \
        NUMBER("temperature", temperature, "T", 0, 100, "0 takes the likeliest token (default: 0)"),                                  \
        COUNT("top-k", top_k, 0, 1e9, "draw among the N likeliest tokens (default: all)"),                                            \
        NUMBER("top-p", top_p, "P", 1e-6, 1, "draw among the likeliest that reach probability P (default: 1)")

static int run_help(const Settings *s, Err *err);

const Command commands[] = {
    {"inspect", "PATH [--tensors] [--json]", "config, tensors, sidecar, parameter count and memory plan",
     "PATH is a model directory, a dataset, a .safetensors file or a .yaml sidecar. Prints a model's config, parameter count and memory "
     "plan in GB; type, name and shape of the tensors of a file; keys and values of a sidecar. --json is for models: family, layers, "
     "hidden_size, heads, kv_heads, head_dim, ff_size, vocab_size, parameters, weight_bytes, kv_bytes_per_token, forest_bytes_2048 "
     "(cache and activations of 2,048 tokens), gpu_weight_bytes.",
     "nla inspect models/smollm2\n"
     "nla inspect --tensors models/smollm2",
     run_inspect, 1, 1, ENGINE | JSON, MODEL_DIR | DATASET, {FLAG("tensors", tensors, "list every tensor of a model")}},

    {"tokenize", "--model DIR [--chat] [TEXT|-]", "text to token ids",
     "Without TEXT, or with -, every line of standard input is one text. Prints an id and its bytes, as a JSON string, a line; with "
     "--json one array of ids a text. Special tokens that the tokenizer adds (BOS) are added.",
     "nla tokenize --model models/smollm2 \"Hello, world\"",
     run_tokenize, 0, 1, JSON, MODEL_DIR,
     {MODEL_OPTION, CHAT_OPTIONS, FLAG("no-special", no_special, "leave out the special tokens that the tokenizer adds (without --chat)")}},

    {"generate", "--model DIR [--chat] [PROMPT|-] [--in FILE]", "continue a text",
     "Without PROMPT, or with -, the prompt is all of standard input; --in takes many. A single reply is streamed as it is made. --json "
     "prints an object a reply: row, sample, text, stop (end or length), prompt_tokens, logprob, ids. A draw depends on --seed, the "
     "prompt's place, the sample and the step alone.",
     "nla generate --model models/smollm2 --chat --max-tokens 60 \"Why is the sky blue?\"\n"
     "nla generate --model models/smollm2 --in texts.jsonl --samples 3 --temperature 1 --json",
     run_generate, 0, 1, ENGINE | SEED | JSON | QUIET, MODEL_DIR | DOCUMENTS,
     {MODEL_OPTION, CHAT_OPTIONS, SAMPLING_OPTIONS,
      COUNT("samples", samples, 1, 4096, "replies to each prompt, which is computed once for all of them (default: 1)"),
      TEXT("in", in, "FILE", "documents, each a prompt; - for standard input"), IDS_OPTION, BATCH_OPTION,
      FLAG("ignore-eos", ignore_eos, "go on after an end token")}},

    {"capture", "--model DIR --in FILE --out DIR [--layer K]", "activations of texts, as a dataset",
     "Runs documents through the model and keeps the residual stream after block K (hidden_states[K+1] in transformers), raw, as f32: a "
     "row for each token that is read, never for a special one. With several layers there is a dataset for each, DIR/layer_K. --json "
     "prints layer, rows and width of each.",
     "nla capture --model models/smollm2 --layer 20 --in texts.jsonl --out acts",
     run_capture, 0, 0, ENGINE | SEED | JSON | QUIET, MODEL_DIR | DOCUMENTS | DATASET,
     {MODEL_OPTION, CHAT_OPTIONS, LAYER_OPTION,
      TEXT("positions", positions, "HOW", "all, last, or N positions a document drawn by (seed, doc_id) (default: all)"),
      TEXT("in", in, "FILE", "the documents; - for standard input"), OUT_OPTION, MAX_LENGTH_OPTION}},

    {"init", "--model DIR [--layer K] [--av DIR] [--ar DIR] [--acts DIR]", "untrained starts of an AV and an AR from a target model",
     "The AV is links to the model's files (no copy) beside a sidecar; the AR is blocks 0 to K with an identity head. The AV needs a "
     "length for the vector that is injected: --injection-scale, or --acts. The marker, its neighbours and the AR's suffix are found "
     "with the model's own tokenizer.",
     "nla init --model models/smollm2 --layer 20 --av av --ar ar --acts acts",
     run_init, 0, 0, TRAINING_ENGINE | QUIET, MODEL_DIR | PAIR | DATASET,
     {MODEL_OPTION, TEXT("layer", layers, "K", "the layer that is read (default: two thirds of the way up)"),
      TEXT("av", av, "DIR", "the AV to make"), TEXT("ar", ar, "DIR", "the AR to make"),
      NUMBER("injection-scale", injection_scale, "X", 0, 1e30, "length of the injected vector; 0: as it is"),
      TEXT("acts", acts, "DIR", "a dataset, or a .safetensors file of vectors, whose mean norm sets that length")}},

    {"verbalize", "--av DIR --acts DIR [--samples N] [--out FILE.jsonl]", "activations to words",
     "Reads every activation of a dataset with the AV and writes a JSON object a sample: row, sample, doc_id and n_raw_tokens when the "
     "dataset has them, explanation (null when it failed), text (all that was drawn), tokens, logprob, failed (a tag is missing), "
     "truncated (cut off at --max-tokens). A sample depends on --seed, its row and its number alone, never on what is decoded beside it.",
     "nla verbalize --av av --acts acts --samples 4 --temperature 1 --out words.jsonl",
     run_verbalize, 0, 0, ENGINE | SEED | QUIET, PAIR | DATASET,
     {TEXT("av", av, "DIR", "the AV"), TEXT("acts", acts, "DIR", "a dataset, or a .safetensors file with activation_vector"),
      TEXT("out", out, "FILE", "where to (default: standard output)"), SAMPLING_OPTIONS,
      COUNT("samples", samples, 1, 4096, "texts for each activation (default: 1)"), BATCH_OPTION,
      FLAG("logprobs", logprobs, "logprobs too: the log-probability of every token"), SIDECAR_OPTION, SCALE_OPTION}},

    {"reconstruct", "--ar DIR --in FILE.jsonl --out FILE.safetensors [--acts DIR]", "words to activations",
     "Reads what verbalize wrote, or any JSONL with \"explanation\" (null: left out) or \"text\" and, if there are, \"row\" and "
     "\"sample\". Writes activation_vector [texts, width] (f32), row and sample (i64). With --acts it also prints how close the vectors "
     "are to those that were explained: texts, failed, mse_nrm, cos, FVE (fve_nrm in --json) and var_nrm.",
     "nla reconstruct --ar ar --in words.jsonl --out vectors.safetensors --acts acts",
     run_reconstruct, 0, 0, ENGINE | JSON | QUIET, PAIR | DATASET,
     {TEXT("ar", ar, "DIR", "the AR"), TEXT("in", in, "FILE", "the explanations; - for standard input"),
      TEXT("out", out, "FILE", "the safetensors file to write"),
      TEXT("acts", acts, "DIR", "the dataset, or .safetensors file, that was explained, for scores"), SIDECAR_OPTION}},

    {"explain", "--model DIR --av DIR [--ar DIR] [--chat] [--html FILE] [TEXT|-]", "the round trip: what a model has in mind at each token",
     "Takes the target's activation at every token of TEXT (without it, or with -, standard input), lets the AV put it into words and "
     "the AR rebuild it from them, and prints both with the FVE: how much of the activation the words carried, 1 is all. Positions below "
     "10 and outliers (a norm above three times the median) decode badly and are marked. --json prints one object: tokens, and a layer's "
     "var_nrm, mean_fve and readings (position, norm, and each sample's explanation, text, fve, cos, mse_nrm).",
     "nla explain --model models/smollm2 --av av --ar ar --html page.html \"The capital of France is\"",
     run_explain, 0, 1, ENGINE | SEED | JSON | QUIET, MODEL_DIR | PAIR,
     {MODEL_OPTION, TEXT("av", av, "DIR", "the AV"), TEXT("ar", ar, "DIR", "the AR; without it there are words but no scores"), CHAT_OPTIONS,
      IDS_OPTION, COUNT("reply", reply, 0, 1e5, "let the model reply first, up to N tokens, and read those too (default: 0)"),
      TEXT("layers", layers, "LIST", "layers to read, such as 3,7,20, or all (default: the AV's)"),
      TEXT("positions", positions, "HOW", "all, last, one position N or a range A:B, B left out (default: all)"),
      TEXT("html", html, "FILE", "write a self-contained page to look at"), SAMPLING_OPTIONS,
      COUNT("samples", samples, 1, 64, "explanations of each activation (default: 1)"), BATCH_OPTION,
      TEXT("acts", acts, "DIR", "a dataset for FVE's denominator (default: the AR's sidecar, else the text's own)"), SIDECAR_OPTION, SCALE_OPTION}},

    {"eval", "--av DIR --ar DIR --acts DIR [--train DIR] [--html FILE]", "FVE on held-out rows, with controls and perturbations",
     "FVE is 1 - mean(mse_nrm) / var_nrm over the rows, a failed explanation counted as mse_nrm 2, with a 95% bootstrap interval. The AR "
     "reads every row's explanation (explained), and in its place another row's (permuted-v, permuted-t), the same words for all "
     "(constant), the explanation shuffled by sentences, in lower-case, unquoted, thinned by a fifth of its words, the row's true prefix "
     "and another row's (prefix, prefix-perm), the explanation that came with the row, if every row has one (written), and that of the "
     "nearest training row (nearest, with --train).\n"
     "Prints a line each: FVE, interval, the same against the mean vector, cosine, centred cosine. --json prints one object with all of "
     "it and position, length and mse by row.",
     "nla eval --av av --ar ar --acts acts --max-tokens 150 --html eval.html",
     run_eval, 0, 0, ENGINE | SEED | JSON | QUIET, PAIR | DATASET,
     {TEXT("av", av, "DIR", "the AV"), TEXT("ar", ar, "DIR", "the AR"),
      TEXT("acts", acts, "DIR", "the held-out dataset; a .safetensors file has no prefixes to compare with"),
      TEXT("train", train, "DIR", "training rows with explanations, for nearest"),
      COUNT("rows", rows, 2, 1e7, "use N rows, spread over the set (default: all)"), TEXT("html", html, "FILE", "write a self-contained page with charts"),
      SAMPLING_OPTIONS, BATCH_OPTION, SCALE_OPTION}},

    {"data extract", "--model DIR --in CORPUS --out DIR [--layer K] [--resume]", "a corpus to activations, the rows that training begins with",
     "At up to --positions-per-doc tokens of every document, drawn by (seed, doc_id), never among its first --min-context ones and never "
     "a special one, keeps the residual stream after block K; a document whose id came before is left out. The directory appears when "
     "all of it is there; until then OUT.partial holds what --resume goes on from after a kill. Shards (--documents A:B) put together by "
     "nla data merge are the one run, byte for byte. Prints rows, bytes, norms, var_nrm and a suggested injection scale.",
     "nla data extract --model models/smollm2 --layer 20 --in corpus/corpus.jsonl --out base\n"
     "nla data extract --model models/smollm2 --in corpus/corpus.jsonl --documents 0:1000 --out shard0\n"
     "nla data extract --model models/smollm2 --in corpus/corpus.jsonl --documents 1000:2000 --out shard1",
     run_data_extract, 0, 0, ENGINE | SEED | JSON | QUIET, MODEL_DIR | DOCUMENTS | DATASET,
     {MODEL_OPTION, LAYER_OPTION, TEXT("in", in, "CORPUS", "the documents; - for standard input"),
      TEXT("out", out, "DIR", "the dataset to make; with several layers DIR/layer_K"),
      COUNT("positions-per-doc", positions_per_doc, 1, 1e6, "tokens read of a document, at most (default: 10)"),
      COUNT("min-context", min_context, 0, 1e6, "tokens at its start that are not read (default: 50)"), MAX_LENGTH_OPTION,
      TEXT("documents", documents, "N|A:B", "the first N documents, or those from A on, counted from 0, before B (default: all)"),
      NUMBER("save-every", save_every, "SECONDS", 0, 1e6, "between two states that --resume can go on from (default: 15)"),
      RESUME_OPTION("go on with the run that OUT.partial holds")}},

    {"data merge", "DIR... --out DIR", "shards of one corpus as one dataset",
     "DIR...: what nla data extract made of consecutive ranges of documents (--documents 0:1000, 1000:2000, ...), in order. Prints rows, "
     "bytes and norms.",
     "nla data merge shard0 shard1 --out merged",
     run_data_merge, 1, 10000, JSON, DATASET, {OUT_OPTION}},

    {"data split", "--acts DIR --out DIR [--parts LIST]", "a dataset in parts, by document",
     "Makes DIR/PART, a dataset, for each part. Every row of a document goes to the same one, by the document's id and --seed alone. "
     "Prints the rows of each.",
     "nla data split --acts base --out parts",
     run_data_split, 0, 0, SEED, DATASET,
     {TEXT("acts", acts, "DIR", "the dataset"), TEXT("out", out, "DIR", "the directory of the parts to make"),
      TEXT("parts", parts, "LIST", "names and weights (default: av_sft:25,ar_sft:25,rl:50,held:4)")}},

    {"data permute", "--acts DIR --out DIR", "the control: the same rows with each other's vectors",
     "A random cycle through all rows, by --seed: no row keeps its own vector. Prints rows, bytes and norms.",
     "nla data permute --acts base --out control",
     run_data_permute, 0, 0, SEED | JSON, DATASET, {TEXT("acts", acts, "DIR", "the dataset"), OUT_OPTION}},

    {"data explain", "--acts DIR --by file|model|api|rules --out FILE.jsonl [-- ...]", "warm-start explanations of rows, from their prefixes",
     "rules writes from the words alone, without a model; model asks an instruct model on disk (--model); file takes what somebody else "
     "wrote (--in); api asks a model behind an API through data/explain_api.py (python3 with xxhash), whose own options follow --, and "
     "keeps its replies in FILE.raw.\n"
     "Lists, emphasis and tags are taken off; what lacks its closing tag or has fewer than two paragraphs is dropped. Writes a line a "
     "row: row_id, prefix, explanation and by, or null and dropped (why). Prints how many were explained and dropped.",
     "nla data explain --acts parts/av_sft --by rules --out av.jsonl\n"
     "nla data explain --acts parts/av_sft --by model --model models/smollm2 --rows 100 --out model.jsonl\n"
     "nla data explain --acts parts/av_sft --by api --out api.jsonl -- --model NAME --style openai --url http://localhost:8000/v1",
     run_data_explain, 0, 1000, ENGINE | SEED | QUIET, MODEL_DIR | DATASET | EXPLANATIONS,
     {TEXT("acts", acts, "DIR", "the dataset whose rows are explained"), TEXT("by", by, "file|model|api|rules", "who writes"),
      TEXT("out", out, "FILE", "the explanations to write"),
      TEXT("in", in, "FILE", "explanations, for --by file; of several files separated by commas the first that has a row counts"), MODEL_OPTION,
      COUNT("rows", rows, 1, 1e9, "only the first N rows (default: all)"),
      COUNT("words", words, 1, 1000, "words of an explanation by rules, at most (default: 106)"), RESUME_OPTION("go on with FILE.part, of a run that was killed"),
      SAMPLING_OPTIONS, BATCH_OPTION}},

    {"data build", "--acts DIR --stage av_sft|ar_sft|rl [--explanations FILE] --out DIR", "training rows: a dataset with explanations and a complete sidecar",
     "av_sft and ar_sft keep the rows that somebody explained, rl all rows without explanations. The sidecar gets the marker, its "
     "neighbours, the AR's suffix and the templates. Prints rows, bytes and norms.",
     "nla data build --acts parts/av_sft --stage av_sft --explanations av.jsonl --out rows",
     run_data_build, 0, 0, JSON | QUIET, MODEL_DIR | DATASET | EXPLANATIONS,
     {TEXT("acts", acts, "DIR", "the dataset"), OUT_OPTION, TEXT("stage", stage, "av_sft|ar_sft|rl", "what the rows are for"),
      TEXT("explanations", explanations, "FILE", "explanations; of several files separated by commas the first that has a row counts (default: the rows' own)"),
      TEXT("model", model, "DIR", "the model of the tokens and templates (default: the one that the dataset names)")}},

    {"data stats", "DIR...", "rows, documents, lengths, norms, repeats, and leakage between datasets",
     "Prints for each dataset rows, documents, tokens of prefixes, norms, var_nrm, words of explanations, repeated prefixes, vectors and "
     "ids, vectors that are zero or not finite; for each two of them how many documents and prefixes they share. --json: an object each.",
     "nla data stats rows parts/held",
     run_data_stats, 1, 1000, JSON, DATASET, {{0}}},

    {"train", "av|ar|rl [--config FILE] [key=value ...]", "teach an AV and an AR, or improve both by RL",
     "av: next-token cross entropy on explanations of activations. ar: mse_nrm of the vectors that explanations are turned into. rl: GRPO "
     "with the live AR as reward and a KL to the AV it started from; the AR learns on the same texts.\n"
     "Settings stand in the config file (YAML) or behind it as key=value, which wins; those that are true|false are false by default. The seed is one of them: there is no --seed. "
     "Writes the run out=DIR; its checkpoints' av/ and ar/ are what other commands open. Interrupted (Ctrl-C, kill) it saves and exits; "
     "with --resume it goes on, bit for bit as if it had not been.",
     "nla train av out=runs/av av=av data=rows eval=parts/held steps=500 batch=32 lora_rank=16\n"
     "nla train ar out=runs/ar ar=ar data=rows steps=500 batch=32 lora_rank=16\n"
     "nla train rl out=runs/rl av=runs/av/checkpoint-500/av ar=runs/ar/checkpoint-500/ar data=parts/rl steps=100\n"
     "nla train rl out=runs/rl --resume",
     run_train, 1, 100, TRAINING_ENGINE | QUIET, PAIR | DATASET | RUN,
     {TEXT("config", config, "FILE", "settings, as YAML (a run's settings.yaml is such a file)"),
      RESUME_OPTION("go on from the newest checkpoint (only out=DIR is needed then)"),
      FLAG("plan", plan, "print the memory that these settings take, in GB, and stop")}},

    {"report", "RUN [--html FILE]", "a page with the curves and samples of a training run",
     "RUN may still be going on. Writes one self-contained page and prints its name.",
     "nla report runs/av",
     run_report, 1, 1, 0, RUN, {TEXT("html", html, "FILE", "where to (default: RUN/report.html)")}},

    {"export", "DIR --out DIR [--merge] [--dtype bf16|f32] [--base DIR]", "a trained AV or AR as a directory that others open",
     "DIR is an AV or an AR, such as RUN/checkpoint-100/av. Adapters stay adapters (PEFT's layout) unless they are merged into the "
     "weights; weights become a Hugging Face directory. The sidecar, and an AR's value head, go along.",
     "nla export runs/av/checkpoint-500/av --merge --out my-av",
     run_export, 1, 1, TRAINING_ENGINE | QUIET, PAIR,
     {TEXT("out", out, "DIR", "the directory to make"), FLAG("merge", merge, "add the adapters to the weights they are for"),
      TEXT("dtype", dtype, "bf16|f32", "of weights (default: bf16) or adapters (default: f32); a head is f32"),
      TEXT("base", base, "DIR", "the base that adapters name, from here or from --out (default: as now)")}},

    {"verify", "[--model DIR] [--fp32]", "op by op, the CUDA engine against the CPU engine",
     "Runs every op forward and back at several sizes and, with --model, a whole forward pass on both engines; prints the largest "
     "difference of each output relative to the largest number expected, and its bound. Exits with 1 when one is beyond. Needs a GPU.",
     "nla verify --model models/smollm2",
     run_verify, 0, 0, TRAINING_ENGINE | JSON | QUIET, MODEL_DIR, {MODEL_OPTION}},

    {"dump", "--model DIR --out FILE [TEXT|-]", "every intermediate of one forward pass, for diffing",
     "Writes a safetensors file: input_ids (i64) and, as f32 [tokens, width] under the names of transformers' modules, what they put out: "
     "model.embed_tokens, model.layers.N.self_attn, model.layers.N.mlp, model.layers.N (the residual stream after block N), model.norm, "
     "lm_head. Without TEXT, or with -, the text is standard input.",
     "nla dump --model models/smollm2 --out forward.safetensors \"The capital of France is\"",
     run_dump, 0, 1, ENGINE | JSON | QUIET, MODEL_DIR,
     {MODEL_OPTION, CHAT_OPTIONS, TEXT("out", out, "FILE", "the safetensors file to write"), IDS_OPTION,
      TEXT("only", only, "NAME", "keep only tensors whose name contains NAME")}},

    {"bench", "[linear|load|forward|decode|verbalize|all] | --ops|--e2e --shape NAME [WORD...]", "speed, op by op and end to end",
     "--ops: what the machine can do (one copy, one large product), then every op of the engine at the sizes of a model, as a decoding "
     "step and a training pass call it: time, least bytes or operations, rate, share of the ceiling, floor. WORDs: only ops with them in "
     "their names.\n"
     "--e2e: whole steps of that shape with random weights made in memory: av and ar (training), decode, explain, rl (with its phases); "
     "rows and tokens a second, floor, peak memory against the plan. WORDs: which of those, and settings of nla train as key=value "
     "(defaults here: batch=256 vectors=64 samples=8 max_tokens=150 micro=16, rl 4).\n"
     "NAME: qwen2.5-7b, qwen3-8b, gemma-3-12b, gemma-3-27b, llama-3.3-70b, smollm2-135m, gemma-3-270m, or a model's directory (./DIR).\n"
     "Without either: linear: one matrix product of --shape (no model needed). load: files to first use. forward: 2,048 packed tokens in "
     "documents of --max-length. decode: --samples replies of --max-tokens to one prompt of 100 random tokens. verbalize (--av, --acts): "
     "--samples of each of --rows vectors over the forest, then each sample alone with its whole prompt; the texts must be the same. all, "
     "the default: load, forward and decode. Prints a line each: median of the times in ms, least and most, work a second (--json: name, "
     "median_s, min_s, max_s, rate, unit).",
     "nla bench linear --shape 512,576,1536\n"
     "nla bench decode --model models/smollm2 --samples 8 --max-tokens 64\n"
     "nla bench --ops --shape ./models/smollm2 --repeat 1 attention\n"
     "nla bench --e2e --shape ./models/smollm2 ar batch=2 lora_rank=4",
     run_bench, 0, 100, ENGINE | SEED | JSON | QUIET, MODEL_DIR | PAIR | DATASET,
     {FLAG("ops", ops, "every op at the sizes of --shape"), FLAG("e2e", e2e, "whole steps at the sizes of --shape"),
      TEXT("shape", shape, "NAME", "of the model; for linear ROWS,IN,OUT"),
      COUNT("repeat", repeat, 1, 1e6, "measurements after one to warm up (default: 5)"),
      COUNT("rows", rows, 1, 65536, "ops: rows of the training pass (default: 2048); verbalize: vectors (default: 64)"),
      COUNT("batch", batch, 1, 65536, "ops: rows of the decoding step (default: 32)"),
      COUNT("prompt-tokens", prompt_tokens, 32, 100000, "e2e: of the AV's prompt (default: 125)"),
      COUNT("av-tokens", av_tokens, 1, 100000, "e2e: of an AV's training row, prompt and response (default: 247)"),
      COUNT("ar-tokens", ar_tokens, 1, 100000, "e2e: of an AR's training row (default: 126)"),
      COUNT("text-tokens", text_tokens, 1, 100000, "e2e: of the text that is explained (default: 200)"), MODEL_OPTION, SAMPLING_OPTIONS,
      TEXT("av", av, "DIR", "verbalize: the AV"), TEXT("acts", acts, "DIR", "verbalize: the dataset, or .safetensors file, that it reads"),
      SIDECAR_OPTION, SCALE_OPTION, COUNT("samples", samples, 1, 4096, "decode, verbalize: texts decoded together, or of each vector (default: 1)"),
      COUNT("max-length", max_length, 1, 1e6, "forward: length of the packed documents, in tokens (default: 2048)")}},

    {"help", "[COMMAND]", "what there is, or all about one command",
     "Without COMMAND lists the commands, with the first word of some (data) those.",
     "nla help data extract\n"
     "nla help --man | man -l -\n"
     "eval \"$(nla help --completion bash)\"",
     run_help, 0, 2, 0, 0,
     {FLAG("man", man, "the man page, for standard output"),
      TEXT("completion", completion, "bash|zsh", "completion for that shell, as a script for standard output")}},
    {0},
};

/* ------------------------------------------------------------------------------------------------ as text for a terminal
 * What is told of a command is said once (tell_command), in the words of a Form: plain text here, roff for the man page. */

typedef struct {
    void (*heading)(const char *text);
    void (*paragraph)(const char *text); /* each line of it is one */
    void (*item)(const char *name, const char *value, const char *text);
    void (*example)(const char *line, int len);
} Form;

enum { WIDTH = 80, LEFT = 28 }; /* columns of a line, and of an item before what it means */

/* Words up to column WIDTH, later lines behind `indent` blanks; `at`: the column that the first begins in. Ends the line. */
static void put_text(const char *text, int at, int indent) {
    for (bool first = true; *text; first = false) {
        int n = (int)strcspn(text, " \n");
        if (!first && (text[-1] == '\n' || at + 1 + n > WIDTH)) {
            printf("\n%*s", indent, "");
            at = indent;
        } else if (!first) {
            putchar(' ');
            at++;
        }
        printf("%.*s", n, text);
        at += n;
        text += n + (text[n] != 0);
    }
    putchar('\n');
}

static void plain_heading(const char *text) {
    printf("\n%s:\n", text);
}

static void plain_paragraph(const char *text) {
    put_text(text, 0, 0);
}

static void plain_item(const char *name, const char *value, const char *text) {
    int n = printf("  %s%s", name, value);
    printf(n < LEFT - 1 ? "%*s" : "\n%*s", n < LEFT - 1 ? LEFT - n : LEFT, "");
    put_text(text, LEFT, LEFT);
}

static void plain_example(const char *line, int len) {
    printf("  %.*s\n", len, line);
}

static const Form plain = {plain_heading, plain_paragraph, plain_item, plain_example};

static void tell_option(const Form *f, const Option *o) {
    char *name = xprintf("--%s%s", o->name, o->value ? " " : "");
    f->item(name, o->value ? o->value : "", o->help);
    free(name);
}

/* The options of a command: its own, and the common ones that it heeds. */
enum { MOST_OPTIONS = sizeof(((Command *)0)->option) / sizeof(Option) + sizeof common_options / sizeof *common_options };
static int options_of(const Command *c, bool common, const Option *list[MOST_OPTIONS]) {
    int n = 0;
    for (const Option *o = c->option; o->name; o++) {
        list[n++] = o;
    }
    for (int i = 0; common && common_options[i].name; i++) {
        if (c->heeds >> i & 1) {
            list[n++] = &common_options[i];
        }
    }
    return n;
}

/* The settings of nla train, each with its stages where not all have it. */
static void tell_settings(const Form *f) {
    f->heading("settings of train");
    for (const RunKey *k = run_keys; k->option.name; k++) {
        char *name = xprintf("%s=", k->option.name), stages[16] = "";
        for (int i = 0; i < 3 && k->stages != ALL_STAGES; i++) {
            if (k->stages >> i & 1) {
                snprintf(stages + strlen(stages), sizeof stages - strlen(stages), "%s%s", *stages ? ", " : "", stage_names[i]);
            }
        }
        char *text = xprintf("%s%s%s", stages, *stages ? ": " : "", k->option.help);
        f->item(name, k->option.value, text);
        free(text);
        free(name);
    }
}

static void tell_examples(const Form *f, const Command *c) {
    f->heading("examples");
    for (const char *line = c->examples; *line;) {
        int n = (int)strcspn(line, "\n");
        f->example(line, n);
        line += n + (line[n] != 0);
    }
}

/* All about one command but its name and usage. Alone: with what the man page says once for all. */
static void tell_command(const Form *f, const Command *c, bool alone) {
    char *summary = xprintf("%c%s.", toupper(c->summary[0]), c->summary + 1);
    f->paragraph(summary);
    free(summary);
    f->paragraph(c->details);
    const Option *option[MOST_OPTIONS];
    int n = options_of(c, alone, option);
    if (n > 0) {
        f->heading("options");
    }
    for (int i = 0; i < n; i++) {
        tell_option(f, option[i]);
    }
    if (c->run == run_train) {
        tell_settings(f);
    }
    if (alone && c->files) {
        f->heading("files");
    }
    for (int i = 0; i < FILES && alone; i++) {
        if (c->files >> i & 1) {
            f->item(files[i][0], "", files[i][1]);
        }
    }
    tell_examples(f, c);
}

/* ------------------------------------------------------------------------------------------------ as a man page */

static void put_roff(const char *text, int len) {
    for (const char *p = text; p < text + len; p++) {
        const char *plainly = *p == '\\' ? "\\e" : *p == '-' ? "\\-" : *p == '\'' ? "\\(aq" : *p == '`' ? "\\(ga" : NULL;
        fputs(p == text && *p == '.' ? "\\&" : "", stdout);
        plainly ? fputs(plainly, stdout) : putchar(*p);
    }
}

static void man_heading(const char *text) {
    printf(".PP\n%c%s:\n", toupper(*text), text + 1);
}

static void man_paragraph(const char *text) {
    for (const char *p = text; *p;) {
        int n = (int)strcspn(p, "\n");
        puts(".PP");
        put_roff(p, n);
        putchar('\n');
        p += n + (p[n] != 0);
    }
}

static void man_item(const char *name, const char *value, const char *text) {
    fputs(".TP\n\\fB", stdout);
    put_roff(name, (int)strlen(name));
    fputs("\\fI", stdout);
    put_roff(value, (int)strlen(value));
    puts("\\fR");
    put_roff(text, (int)strlen(text));
    putchar('\n');
}

static void man_example(const char *line, int len) {
    fputs(".PP\n.EX\n    ", stdout);
    put_roff(line, len);
    puts("\n.EE");
}

static const Form roff = {man_heading, man_paragraph, man_item, man_example};

static const char about[] = "It reads what a language model holds in its residual stream: an AV (activation verbalizer) says in words what is "
                            "in an activation, an AR (activation reconstructor) rebuilds the activation from the words alone, and both are "
                            "trained here.";
static const char streams[] = "Results go to standard output, progress and timing to standard error.";
static const char *const environment[][2] = {
    {"NLA_CPU", "any, avx2 or avx512: the widest instructions that the CPU engine may use (default: what the processor has)."},
    {"OMP_NUM_THREADS", "threads of the CPU engine where --threads does not say (default: all)."},
    {"PATH", "where gzip, for documents that end in .gz, and python3, for data explain --by api, are found."},
};
static const char *const exits[][2] = {
    {"0", "done"}, {"1", "failed; the last line on standard error says what, where, why and how to mend it"}, {"2", "wrong usage"}};

static void tell_section(const Form *f, const char *heading, const char *const items[][2], int n) {
    printf(".SH %s\n", heading);
    for (int i = 0; i < n; i++) {
        f->item(items[i][0], "", items[i][1]);
    }
}

static void put_man_page(void) {
    puts(".\\\" Written by: nla help --man\n.TH NLA 1 \"\" \"nla\" \"User Commands\"\n.SH NAME\nnla \\- natural language autoencoders\n"
         ".SH SYNOPSIS\n.B nla\n.I COMMAND\n[options]\n.SH DESCRIPTION");
    roff.paragraph(about);
    roff.paragraph(streams);
    puts(".SH COMMANDS");
    for (const Command *c = commands; c->name; c++) {
        printf(".SS nla %s\n\\fBnla %s\\fR ", c->name, c->name);
        put_roff(c->usage, (int)strlen(c->usage));
        putchar('\n');
        tell_command(&roff, c, false);
    }
    puts(".SH COMMON OPTIONS\nEvery command takes them; not all have something to do with each.");
    for (const Option *o = common_options; o->name; o++) {
        tell_option(&roff, o);
    }
    tell_section(&roff, "FILES", files, FILES);
    tell_section(&roff, "ENVIRONMENT", environment, sizeof environment / sizeof *environment);
    tell_section(&roff, "EXIT STATUS", exits, sizeof exits / sizeof *exits);
    puts(".SH SEE ALSO");
    roff.paragraph("nla help COMMAND tells the same of one command. README.md and docs/architecture.md of the sources: the method, the tour.");
}

/* ------------------------------------------------------------------------------------------------ as completion
 * The table as shell code, before fixed code that reads it. What can stand for a value is told by how help calls it. */

static bool is_path(const char *value) {
    return strncmp(value, "FILE", 4) == 0 || strcmp(value, "CORPUS") == 0 || strcmp(value, "PATH") == 0;
}

static bool is_directory(const char *value) {
    return strncmp(value, "DIR", 3) == 0 || strcmp(value, "RUN") == 0;
}

static bool is_words(const char *value) {
    return strchr(value, '|') && !isupper(*value);
}

static void put_swapped(const char *text, char from, char to) {
    for (; *text; text++) {
        putchar(*text == from ? to : *text);
    }
}

/* What the usage begins with when that is an argument, without its brackets and dots; else "". To be freed. */
static char *first_argument(const Command *c) {
    const char *from = c->usage + (c->usage[0] == '[');
    return xstrndup(from, *from == '-' ? 0 : strcspn(from, " .]"));
}

/* ---- bash: the value of an option or setting as a word of its own list: DIR, FILE, a|b|c; nothing for what cannot be offered */

static void bash_value(const char *value) {
    fputs(is_directory(value) ? "DIR" : is_path(value) ? "FILE" : is_words(value) || strcmp(value, "COMMAND") == 0 ? value : "", stdout);
}

static void bash_option(const Option *o) {
    printf(o->value ? " --%s=" : " --%s", o->name);
    bash_value(o->value ? o->value : "");
}

static void bash_command(const Command *c) {
    const Option *option[MOST_OPTIONS];
    int n = options_of(c, true, option);
    char *argument = first_argument(c);
    printf("    '%s') argument='", c->name);
    bash_value(argument);
    fputs("' options='", stdout);
    for (int i = 0; i < n; i++) {
        bash_option(option[i]);
    }
    puts("' ;;");
    free(argument);
}

static void bash_settings(int stage) {
    printf("    'train %s') settings='", stage_names[stage]);
    for (const RunKey *k = run_keys; k->option.name; k++) {
        if (k->stages >> stage & 1) {
            printf(" %s=", k->option.name);
            bash_value(k->option.value);
        }
    }
    puts("' ;;");
}

static void put_bash(void) {
    fputs("# Completion of nla for bash. Written by: nla help --completion bash\n"
          "_nla() {\n"
          "    local word=${COMP_WORDS[COMP_CWORD]} name=${COMP_WORDS[COMP_CWORD-1]} command=${COMP_WORDS[1]} commands='", stdout);
    for (const Command *c = commands; c->name; c++) {
        putchar(' ');
        put_swapped(c->name, ' ', '/');
    }
    puts("'\n"
         "    local item equals='' offer='' words='' argument='' options='' settings=''\n"
         "    COMPREPLY=()\n"
         "    if [[ $name == '=' ]]; then name=${COMP_WORDS[COMP_CWORD-2]} equals=1; fi # bash cuts name=value in three\n"
         "    if [[ $word == '=' ]]; then word='' equals=1; fi\n"
         "    if [[ $commands == *\" $command/\"* ]]; then command+=\" ${COMP_WORDS[2]}\"; fi\n"
         "    case $command in");
    for (const Command *c = commands; c->name; c++) {
        bash_command(c);
    }
    puts("    esac\n"
         "    if [[ $command == train ]]; then\n"
         "        for item in \"${COMP_WORDS[@]:2:COMP_CWORD-2}\"; do\n"
         "            if [[ $item == @(av|ar|rl) ]]; then command+=\" $item\" argument=''; break; fi\n"
         "        done\n"
         "    fi\n"
         "    case $command in");
    for (int stage = 0; stage < 3; stage++) {
        bash_settings(stage);
    }
    puts("    esac\n"
         "    if ((COMP_CWORD == 1)); then\n"
         "        for item in $commands; do words+=\" ${item%%/*}\"; done\n"
         "    elif [[ $commands == *\" $name/\"* ]] && [[ $COMP_CWORD == 2 || $command == help ]]; then\n"
         "        for item in $commands; do [[ $item == \"$name/\"* ]] && words+=\" ${item#*/}\"; done\n"
         "    else\n"
         "        offer=none\n"
         "        for item in $options; do [[ $item == \"$name=\"* ]] && offer=${item#*=}; done\n"
         "        for item in $settings; do [[ $equals && $item == \"$name=\"* ]] && offer=${item#*=}; done\n"
         "        if [[ $offer == none && ! $equals ]]; then\n"
         "            offer=$argument\n"
         "            if [[ $word == -* || ! $argument$settings ]]; then\n"
         "                offer=''\n"
         "                for item in $options; do words+=\" ${item%%=*}\"; done\n"
         "            elif [[ $settings ]]; then\n"
         "                for item in $settings; do words+=\" ${item%%=*}=\"; done\n"
         "                compopt -o nospace 2>/dev/null\n"
         "            fi\n"
         "        fi\n"
         "    fi\n"
         "    case $offer in\n"
         "    none) ;;\n"
         "    DIR) mapfile -t COMPREPLY < <(compgen -d -- \"$word\") && compopt -o filenames 2>/dev/null ;;\n"
         "    FILE) mapfile -t COMPREPLY < <(compgen -f -- \"$word\") && compopt -o filenames 2>/dev/null ;;\n"
         "    COMMAND) for item in $commands; do words+=\" ${item%%/*}\"; done ;;&\n"
         "    COMMAND | '') mapfile -t COMPREPLY < <(compgen -W \"$words\" -- \"$word\") ;;\n"
         "    *) mapfile -t COMPREPLY < <(compgen -W \"${offer//|/ }\" -- \"$word\") ;;\n"
         "    esac\n"
         "}\n"
         "complete -F _nla nla");
}

/* ---- zsh: specifications of _arguments, with what each option is for */

/* In single quotes of the shell; with `more` escaped too. */
static void zsh_text(const char *text, const char *more) {
    for (; *text; text++) {
        fputs(*text == '\'' ? "'\\'" : strchr(more, *text) ? "\\" : "", stdout);
        putchar(*text);
    }
}

/* What stands behind "message:" of a specification. */
static void zsh_value(const char *value) {
    if (is_words(value)) {
        putchar('(');
        put_swapped(value, '|', ' ');
        putchar(')');
    } else {
        fputs(is_directory(value) ? "_files -/" : is_path(value) ? "_files" : " ", stdout);
    }
}

static void zsh_option(const Option *o) {
    printf(" '--%s%s[", o->name, o->value ? "=" : "");
    zsh_text(o->help, "[]:\\");
    putchar(']');
    if (o->value) {
        printf(":%s:", o->value);
        zsh_value(o->value);
    }
    putchar('\'');
}

static void zsh_command(const Command *c) {
    const Option *option[MOST_OPTIONS];
    int n = options_of(c, true, option);
    char *argument = first_argument(c);
    printf("    '%s') options=(", c->name);
    for (int i = 0; i < n; i++) {
        zsh_option(option[i]);
    }
    if (c->run == run_train) {
        fputs(" '1:stage:(av ar rl)' '*:setting:_nla_setting'", stdout);
    } else if (c->run == run_help) {
        fputs(" '1:command:($first)' '2:command:($second)'", stdout);
    } else if (*argument) {
        printf(" '%s:%s:", c->most > 1 ? "*" : "1", argument);
        zsh_value(argument);
        putchar('\'');
    }
    puts(") ;;");
    free(argument);
}

static void zsh_settings(int stage) {
    printf("    %s) settings=(", stage_names[stage]);
    for (const RunKey *k = run_keys; k->option.name; k++) {
        if (k->stages >> stage & 1) {
            printf(" '%s:", k->option.name);
            zsh_text(k->option.help, "\\");
            putchar('\'');
        }
    }
    puts(") ;;");
}

static void put_zsh(void) {
    puts("#compdef nla\n"
         "# Completion of nla for zsh. Written by: nla help --completion zsh\n"
         "_nla_setting() { # key=value of train\n"
         "    local -a settings\n"
         "    case $words[(r)(av|ar|rl)] in");
    for (int stage = 0; stage < 3; stage++) {
        zsh_settings(stage);
    }
    puts("    esac\n"
         "    if ! compset -P '*='; then _describe setting settings -S =; return; fi\n"
         "    case ${IPREFIX%=} in");
    for (const RunKey *k = run_keys; k->option.name; k++) {
        if (is_words(k->option.value)) {
            printf("    %s) compadd -- ", k->option.name);
            put_swapped(k->option.value, '|', ' ');
            puts(" ;;");
        } else if (is_directory(k->option.value)) {
            printf("    %s) _files -/ ;;\n", k->option.name);
        }
    }
    puts("    esac\n"
         "}\n"
         "_nla() {\n"
         "    local command item\n"
         "    local -a commands options\n"
         "    local -aU first second # words of commands\n"
         "    commands=(");
    for (const Command *c = commands; c->name; c++) {
        printf("        '%s:", c->name);
        zsh_text(c->summary, "\\");
        puts("'");
    }
    puts("    )\n"
         "    for item in $commands; do\n"
         "        if [[ ${item%%:*} == *' '* ]]; then first+=(${item%% *}); else first+=($item); fi\n"
         "        [[ $item == \"$words[CURRENT-1] \"* ]] && second+=(${item#* })\n"
         "    done\n"
         "    if ((CURRENT == 2)); then _describe command first; return; fi\n"
         "    command=$words[2]\n"
         "    if ((${#second} && CURRENT == 3)); then _describe command second; return; fi\n"
         "    if [[ -n ${(M)commands:#$command *} ]]; then command=\"$command $words[3]\"; shift words; ((CURRENT--)); fi\n"
         "    shift words\n"
         "    ((CURRENT--))\n"
         "    first=(${first%%:*}) second=(${second%%:*})\n"
         "    case $command in");
    for (const Command *c = commands; c->name; c++) {
        zsh_command(c);
    }
    puts("    esac\n"
         "    _arguments : $options\n"
         "}\n"
         "_nla \"$@\"");
}

static int put_completion(const char *shell, Err *err) {
    if (strcmp(shell, "bash") == 0) {
        put_bash();
    } else if (strcmp(shell, "zsh") == 0) {
        put_zsh();
    } else {
        return fail(err, "--completion takes bash or zsh, not '%s'", shell);
    }
    return 0;
}

/* ------------------------------------------------------------------------------------------------ nla help */

static void list_commands(const char *first) {
    size_t n = strlen(first);
    for (const Command *c = commands; c->name; c++) {
        if (strncmp(c->name, first, n) == 0) {
            printf("  %-13s %s\n", c->name, c->summary);
        }
    }
}

static int run_help(const Settings *s, Err *err) {
    if (s->man) {
        put_man_page();
        return 0;
    }
    if (s->completion) {
        return put_completion(s->completion, err);
    }
    if (!arrlen(s->argument)) {
        puts("nla: natural language autoencoders.\n\nusage: nla COMMAND [options]      nla help COMMAND tells all about one\n");
        plain.paragraph(about);
        putchar('\n');
        list_commands("");
        printf("\n%s\nExit status: 0 done, 1 failed, 2 wrong usage.\n", streams);
        return 0;
    }
    char *name = arrlen(s->argument) > 1 ? xprintf("%s %s", s->argument[0], s->argument[1]) : xstrdup(s->argument[0]);
    const Command *c = find_command(name);
    int status = 0;
    if (c) {
        put_text(c->usage, printf("usage: nla %s ", c->name), (int)strlen("usage: nla "));
        putchar('\n');
        tell_command(&plain, c, true);
    } else if (is_first_word(name)) {
        list_commands(name);
    } else {
        status = fail(err, "there is no command '%s'; nla help lists them", name);
    }
    free(name);
    return status;
}
