/* tokenizer_bench.c - the tokenizer without the rest of nla, for tests/tokenizer_parity.py and for timing by hand.
 *
 *   tokenizer_bench load FILE TIMES              seconds to read tokenizer.json, the best of TIMES
 *   tokenizer_bench encode FILE PLAIN SPECIAL    records from stdin (u32 length, bytes): each record's ids with the
 *                                                special tokens to the file SPECIAL, without to PLAIN (u32 count, i32 ids)
 *   tokenizer_bench decode FILE ALL SHOWN        records of ids from stdin (u32 count, i32 ids): each text to the file
 *                                                ALL, without the special tokens to SHOWN (u32 length, bytes)
 *   tokenizer_bench chat DIR GENERATE DATE       records from stdin, role and content by turns; the rendering to stdout
 *   tokenizer_bench unassigned                   the code points that PCRE2's Unicode does not know, one a line
 *   tokenizer_bench nfc                          records from stdin: the NFC of each by utf8proc to stdout
 *
 * encode and decode print the seconds that the calls themselves took, once over all records. Host byte order. Build:
 *   cc -std=gnu17 -O3 -I. tests/tokenizer_bench.c tokenizer.c tokenizer_file.c chat.c safetensors.c \
 *       -lpcre2-8 -lutf8proc -lyaml -lm
 */
#include "nla.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <stb/stb_ds.h>
#include <utf8proc.h>

typedef struct {
    char *bytes;
    uint32_t len; /* as written in front: bytes or ids */
} Record;

static void die(const char *why) {
    fprintf(stderr, "tokenizer_bench: %s\n", why);
    exit(1);
}

static double clock_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static Record *read_records(size_t width) {
    Record *records = NULL;
    uint32_t len;
    while (fread(&len, sizeof len, 1, stdin) == 1) {
        Record record = {xmalloc(width * len + 1), len};
        if (len && fread(record.bytes, width, len, stdin) != len) die("a record is cut short");
        record.bytes[width * len] = '\0';
        arrput(records, record);
    }
    return records;
}

static void write_record(FILE *out, const void *bytes, uint32_t len, size_t width) {
    fwrite(&len, sizeof len, 1, out);
    if (len) fwrite(bytes, width, len, out);
}

static Tokenizer *open_file(const char *path) {
    Err err = {0};
    File file;
    Tokenizer *tok = file_map(&file, path, &err) ? NULL : tokenizer_parse(file.data, file.len, path, &err);
    if (!tok) die(err.msg);
    file_unmap(&file);
    return tok;
}

static void run_load(const char *path, int times) {
    double best = 1e9;
    for (int i = 0; i < times; i++) {
        double start = clock_now();
        tokenizer_free(open_file(path));
        if (clock_now() - start < best) best = clock_now() - start;
    }
    printf("%.4f\n", best);
}

static void encode_all(const Tokenizer *tok, const Record *records, bool special, const char *path) {
    FILE *out = fopen(path, "wb");
    if (!out) die("cannot write the ids");
    double seconds = 0;
    int *ids = NULL;
    for (int i = 0; i < arrlen(records); i++) {
        Err err = {0};
        if (ids) arrsetlen(ids, 0);
        double start = clock_now();
        if (tokenizer_encode(tok, records[i].bytes, records[i].len, special, &ids, &err)) die(err.msg);
        seconds += clock_now() - start;
        write_record(out, ids, (uint32_t)arrlen(ids), sizeof *ids);
    }
    if (fclose(out)) die("cannot write the ids");
    arrfree(ids);
    printf("%.6f\n", seconds);
}

static void decode_all(const Tokenizer *tok, const Record *records, bool skip_special, const char *path) {
    FILE *out = fopen(path, "wb");
    if (!out) die("cannot write the texts");
    double seconds = 0;
    for (int i = 0; i < arrlen(records); i++) {
        size_t len;
        double start = clock_now();
        char *text =
            tokenizer_decode(tok, (const int *)(const void *)records[i].bytes, (int)records[i].len, skip_special, &len);
        seconds += clock_now() - start;
        write_record(out, text, (uint32_t)len, 1);
        free(text);
    }
    if (fclose(out)) die("cannot write the texts");
    printf("%.6f\n", seconds);
}

static void run_chat(const char *dir, bool generate, const char *date) {
    Err err = {0};
    Record *records = read_records(1);
    ChatMessage *messages = NULL;
    for (int i = 0; i + 1 < arrlen(records); i += 2)
        arrput(messages, ((ChatMessage){records[i].bytes, records[i + 1].bytes}));
    Tokenizer *tok = tokenizer_load(dir, &err);
    char *text = tok ? chat_render(tok, messages, (int)arrlen(messages), generate, *date ? date : NULL, &err) : NULL;
    if (!text) die(err.msg);
    fputs(text, stdout);
    free(text);
    tokenizer_free(tok);
}

static void run_unassigned(void) {
    int code;
    PCRE2_SIZE place;
    pcre2_code *regex = pcre2_compile((PCRE2_SPTR) "\\p{Cn}", PCRE2_ZERO_TERMINATED, PCRE2_UTF, &code, &place, NULL);
    pcre2_match_data *match = pcre2_match_data_create(1, NULL);
    for (int cp = 0; cp < 0x110000; cp++) {
        if (cp >= 0xD800 && cp < 0xE000) continue;
        utf8proc_uint8_t text[4];
        size_t len = (size_t)utf8proc_encode_char(cp, text);
        if (pcre2_match(regex, text, len, 0, 0, match, NULL) > 0) printf("%d\n", cp);
    }
    pcre2_match_data_free(match);
    pcre2_code_free(regex);
}

static void run_nfc(void) {
    Record *records = read_records(1);
    for (int i = 0; i < arrlen(records); i++) {
        utf8proc_uint8_t *text = NULL;
        utf8proc_ssize_t len = utf8proc_map((const utf8proc_uint8_t *)records[i].bytes, records[i].len, &text,
                                            UTF8PROC_STABLE | UTF8PROC_COMPOSE);
        if (len < 0) die(utf8proc_errmsg(len));
        write_record(stdout, text, (uint32_t)len, 1);
        free(text);
    }
}

int main(int argc, char **argv) {
    const char *mode = argc > 1 ? argv[1] : "";
    if (!strcmp(mode, "load") && argc == 4) {
        run_load(argv[2], atoi(argv[3]));
    } else if ((!strcmp(mode, "encode") || !strcmp(mode, "decode")) && argc == 5) {
        bool encode = mode[0] == 'e';
        Tokenizer *tok = open_file(argv[2]);
        Record *records = read_records(encode ? 1 : sizeof(int));
        (encode ? encode_all : decode_all)(tok, records, false, argv[3]);
        (encode ? encode_all : decode_all)(tok, records, true, argv[4]);
    } else if (!strcmp(mode, "chat") && argc == 5) {
        run_chat(argv[2], atoi(argv[3]), argv[4]);
    } else if (!strcmp(mode, "unassigned")) {
        run_unassigned();
    } else if (!strcmp(mode, "nfc")) {
        run_nfc();
    } else {
        die("see the first lines of tests/tokenizer_bench.c");
    }
    return 0;
}
