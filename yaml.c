/* yaml.c - sidecars and run files: YAML 1.1 through libyaml, as a tree that keeps unknown keys and how scalars were written.
 *
 * As in safetensors.c every input is taken as hostile: nesting and size are bounded, aliases, tags and repeated keys refused, each
 * with one line that names the file, the line and the reason.
 */
#define _GNU_SOURCE /* memmem */
#include "nla.h"

#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <stb/stb_ds.h>
#include <yaml.h>

enum { MAX_NESTING = 64 };
static const size_t MAX_YAML_BYTES = (size_t)16 << 20; /* sidecars take kilobytes */

/* ------------------------------------------------------------------------------------------------ YAML: reading */

/* Builds the tree from libyaml's events. A node hangs from its parent as soon as it exists, so freeing the root frees
 * whatever was read; a map that has one key more than items waits for that key's value. */
typedef struct {
    yaml_parser_t parser;
    const char *file, *text;
    Yaml *root;
    Yaml *open[MAX_NESTING];
    int depth;
} YamlReader;

static int yaml_fail(const YamlReader *r, yaml_mark_t mark, const char *why, Err *err) {
    return fail(err, "%s: line %zu: %s", r->file, mark.line + 1, why);
}

static int yaml_parser_fail(const YamlReader *r, Err *err) {
    const yaml_parser_t *p = &r->parser;
    size_t line = p->problem_mark.line + 1;
    if (p->error == YAML_READER_ERROR) { /* bad bytes: libyaml tells only the offset */
        line = 1;
        for (size_t i = 0; i < p->problem_offset; i++) line += r->text[i] == '\n';
    }
    const char *problem = p->problem ? p->problem : "out of memory";
    return fail(err, "%s: line %zu: invalid YAML: %s%s%s", r->file, line, p->context ? p->context : "",
                p->context ? ": " : "", problem);
}

static bool awaits_value(const Yaml *map) {
    return arrlen(map->key) > arrlen(map->item);
}

static int yaml_attach(YamlReader *r, Yaml *node, yaml_mark_t mark, Err *err) {
    Yaml *parent = r->depth ? r->open[r->depth - 1] : NULL;
    if (!parent) {
        r->root = node;
    } else if (parent->kind == YAML_LIST || awaits_value(parent)) {
        arrput(parent->item, node);
    } else { /* a key */
        bool scalar = node->kind == YAML_SCALAR;
        if (scalar) arrput(parent->key, xstrdup(node->text));
        yaml_free(node);
        if (!scalar) return yaml_fail(r, mark, "a key must be a scalar", err);
    }
    return 0;
}

static int yaml_open(YamlReader *r, const yaml_event_t *event, int kind, const yaml_char_t *tag, Err *err) {
    if (tag) return yaml_fail(r, event->start_mark, "tags are not supported", err);
    if (r->depth == MAX_NESTING) return yaml_fail(r, event->start_mark, "nested more than 64 deep", err);
    Yaml *node = yaml_new(kind);
    if (yaml_attach(r, node, event->start_mark, err)) return -1;
    r->open[r->depth++] = node;
    return 0;
}

static int yaml_scalar(YamlReader *r, const yaml_event_t *event, Err *err) {
    const char *tag = (const char *)event->data.scalar.tag;
    const char *value = (const char *)event->data.scalar.value;
    size_t len = event->data.scalar.length;
    bool string_tag = tag && (!strcmp(tag, "!") || !strcmp(tag, YAML_STR_TAG));
    if (tag && !string_tag) return yaml_fail(r, event->start_mark, "tags are not supported", err);
    if (memchr(value, 0, len)) return yaml_fail(r, event->start_mark, "a scalar holds a NUL", err);
    Yaml *node = yaml_new(YAML_SCALAR);
    node->text = xstrndup(value, len);
    node->quoted = string_tag || event->data.scalar.style != YAML_PLAIN_SCALAR_STYLE || strchr(node->text, '\n');
    return yaml_attach(r, node, event->start_mark, err);
}

static int yaml_close(YamlReader *r, const yaml_event_t *event, Err *err) {
    const Yaml *map = r->open[--r->depth];
    NameHash *names = NULL;
    for (int i = 0; i < arrlen(map->key); i++) arrput(names, name_hash(map->key[i], strlen(map->key[i]), i));
    int repeat = sort_and_find_repeat(names, arrlenu(names));
    arrfree(names);
    if (repeat < 0) return 0;
    return fail(err, "%s: line %zu: the key \"%.200s\" stands twice in the map that ends here", r->file,
                event->start_mark.line + 1, map->key[repeat]);
}

static int yaml_event(YamlReader *r, const yaml_event_t *event, Err *err) {
    switch (event->type) {
    case YAML_DOCUMENT_START_EVENT:
        return r->root ? yaml_fail(r, event->start_mark, "a second document starts; one is expected", err) : 0;
    case YAML_ALIAS_EVENT:
        return yaml_fail(r, event->start_mark, "aliases are not supported; write the value out", err);
    case YAML_SCALAR_EVENT: return yaml_scalar(r, event, err);
    case YAML_MAPPING_START_EVENT: return yaml_open(r, event, YAML_MAP, event->data.mapping_start.tag, err);
    case YAML_SEQUENCE_START_EVENT: return yaml_open(r, event, YAML_LIST, event->data.sequence_start.tag, err);
    case YAML_MAPPING_END_EVENT:
    case YAML_SEQUENCE_END_EVENT: return yaml_close(r, event, err);
    default: return 0;
    }
}

static int yaml_read(YamlReader *r, Err *err) {
    for (bool more = true; more;) {
        yaml_event_t event;
        if (!yaml_parser_parse(&r->parser, &event)) return yaml_parser_fail(r, err);
        more = event.type != YAML_STREAM_END_EVENT;
        int status = yaml_event(r, &event, err);
        yaml_event_delete(&event);
        if (status) return -1;
    }
    if (!r->root) return fail(err, "%s: empty where YAML is expected", r->file);
    return r->root->kind == YAML_MAP ? 0 : fail(err, "%s: the top level is not a map (key: value)", r->file);
}

/* libyaml compares each %TAG directive with all before it: a megabyte of them takes minutes. Tags are refused anyway. A
 * directive starts a line: it follows LF, CR, NEL, LS, PS or a byte order mark. */
static bool has_tag_directive(const char *text, size_t len) {
    static const char *const before[] = {"\n", "\r", "\xC2\x85", "\xE2\x80\xA8", "\xE2\x80\xA9", "\xEF\xBB\xBF"};
    const char *end = text + len;
    for (const char *p = text; (p = memmem(p, (size_t)(end - p), "%TAG", 4)); p++) {
        for (size_t i = 0; i < sizeof before / sizeof *before; i++) {
            size_t n = strlen(before[i]);
            if (p == text || ((size_t)(p - text) >= n && memcmp(p - n, before[i], n) == 0)) return true;
        }
    }
    return false;
}

Yaml *yaml_parse(const char *text, size_t len, const char *file, Err *err) {
    YamlReader r = {.file = file, .text = text};
    if (len > MAX_YAML_BYTES) {
        fail(err, "%s: %zu bytes of YAML; the limit is 16 MiB", file, len);
        return NULL;
    }
    if (has_tag_directive(text, len)) {
        fail(err, "%s: %%TAG directives are not supported", file);
        return NULL;
    }
    if (!yaml_parser_initialize(&r.parser)) {
        fail(err, "%s: out of memory", file);
        return NULL;
    }
    yaml_parser_set_encoding(&r.parser, YAML_UTF8_ENCODING);
    yaml_parser_set_input_string(&r.parser, (const unsigned char *)text, len);
    if (yaml_read(&r, err)) {
        yaml_free(r.root);
        r.root = NULL;
    }
    yaml_parser_delete(&r.parser);
    return r.root;
}

Yaml *yaml_load(const char *path, Err *err) {
    File file;
    if (file_map(&file, path, err)) return NULL;
    Yaml *root = yaml_parse(file.data ? file.data : "", file.len, path, err);
    file_unmap(&file);
    return root;
}

/* ------------------------------------------------------------------------------------------------ YAML: the tree */

Yaml *yaml_new(int kind) {
    Yaml *node = xcalloc(1, sizeof *node);
    *node = (Yaml){.kind = (__typeof__(node->kind))kind};
    return node;
}

/* Recursive, as yaml_emit_node: a tree is at most MAX_NESTING deep. */
void yaml_free(Yaml *node) {
    if (!node) return;
    for (int i = 0; i < arrlen(node->key); i++) free(node->key[i]);
    for (int i = 0; i < arrlen(node->item); i++) yaml_free(node->item[i]);
    arrfree(node->key);
    arrfree(node->item);
    free(node->text);
    free(node);
}

static int yaml_find(const Yaml *map, const char *key, size_t len) {
    for (int i = 0; i < arrlen(map->key); i++)
        if (strlen(map->key[i]) == len && !memcmp(map->key[i], key, len)) return i;
    return -1;
}

Yaml *yaml_get(const Yaml *map, const char *dotted_path) {
    for (const char *part = dotted_path;;) {
        size_t len = strcspn(part, ".");
        int i = map && map->kind == YAML_MAP ? yaml_find(map, part, len) : -1;
        if (i < 0) return NULL;
        if (!part[len]) return map->item[i];
        map = map->item[i];
        part += len + 1;
    }
}

/* The place for `key` in the map, holding NULL or what stood there. */
static Yaml **yaml_slot(Yaml *map, const char *key, size_t len) {
    int i = yaml_find(map, key, len);
    if (i >= 0) return &map->item[i];
    arrput(map->key, xstrndup(key, len));
    arrput(map->item, NULL);
    return &map->item[arrlen(map->item) - 1];
}

void yaml_set(Yaml *map, const char *dotted_path, const char *text, bool quoted) {
    for (const char *part = dotted_path;;) {
        size_t len = strcspn(part, ".");
        bool last = !part[len];
        Yaml **slot = yaml_slot(map, part, len);
        if (last || !*slot || (*slot)->kind != YAML_MAP) {
            yaml_free(*slot);
            *slot = yaml_new(last ? YAML_SCALAR : YAML_MAP);
        }
        if (last) {
            (*slot)->text = xstrdup(text);
            (*slot)->quoted = quoted;
            return;
        }
        map = *slot;
        part += len + 1;
    }
}

/* An unquoted scalar that starts as a decimal number does: strtod alone would also take "nan", "0x1p3" and " 1". */
static const char *yaml_number(const Yaml *node) {
    if (!node || node->kind != YAML_SCALAR || node->quoted) return NULL;
    const char *digits = node->text + (node->text[0] == '-' || node->text[0] == '+');
    bool decimal = isdigit((unsigned char)digits[0]) || (digits[0] == '.' && isdigit((unsigned char)digits[1]));
    return decimal && !strpbrk(digits, "xX") ? node->text : NULL;
}

bool yaml_int(const Yaml *node, int64_t *value) {
    const char *text = yaml_number(node);
    if (!text) return false;
    const char *digits = text + (text[0] == '-' || text[0] == '+');
    if (digits[0] == '0' && digits[1]) return false; /* YAML 1.1 reads 010 as eight */
    char *end;
    errno = 0;
    long long read = strtoll(text, &end, 10);
    if (errno || *end) return false;
    *value = read;
    return true;
}

bool yaml_double(const Yaml *node, double *value) {
    const char *text = yaml_number(node);
    if (!text) return false;
    char *end;
    double read = strtod(text, &end);
    if (*end || !isfinite(read)) return false;
    *value = read;
    return true;
}

/* ------------------------------------------------------------------------------------------------ YAML: writing */

static bool emit(yaml_emitter_t *emitter, int event_made, yaml_event_t *event) {
    return event_made && yaml_emitter_emit(emitter, event);
}

/* libyaml itself turns to quotes where the style asked for cannot hold the text. */
static bool emit_scalar(yaml_emitter_t *emitter, const char *text, bool quoted) {
    yaml_scalar_style_t style = !quoted              ? YAML_PLAIN_SCALAR_STYLE
                                : strchr(text, '\n') ? YAML_LITERAL_SCALAR_STYLE
                                                     : YAML_DOUBLE_QUOTED_SCALAR_STYLE;
    yaml_event_t event;
    int made =
        yaml_scalar_event_initialize(&event, NULL, NULL, (const yaml_char_t *)text, (int)strlen(text), 1, 1, style);
    return emit(emitter, made, &event);
}

/* Lists of numbers and plain words are written as [1318, 29], as sidecars have them. Other plain scalars (null as nothing,
 * 1:08) would gain quotes there. */
static bool fits_one_line(const Yaml *list) {
    const char *word = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz._+";
    for (int i = 0; i < arrlen(list->item); i++) {
        const Yaml *item = list->item[i];
        if (item->kind != YAML_SCALAR || item->quoted) return false;
        const char *text = item->text + (item->text[0] == '-');
        if (!*text || text[strspn(text, word)]) return false;
    }
    return true;
}

static bool emit_node(yaml_emitter_t *emitter, const Yaml *node) {
    yaml_event_t event;
    if (node->kind == YAML_SCALAR) return emit_scalar(emitter, node->text, node->quoted);
    if (node->kind == YAML_LIST) {
        yaml_sequence_style_t style = fits_one_line(node) ? YAML_FLOW_SEQUENCE_STYLE : YAML_BLOCK_SEQUENCE_STYLE;
        if (!emit(emitter, yaml_sequence_start_event_initialize(&event, NULL, NULL, 1, style), &event)) return false;
        for (int i = 0; i < arrlen(node->item); i++)
            if (!emit_node(emitter, node->item[i])) return false;
        return emit(emitter, yaml_sequence_end_event_initialize(&event), &event);
    }
    int made = yaml_mapping_start_event_initialize(&event, NULL, NULL, 1, YAML_BLOCK_MAPPING_STYLE);
    if (!emit(emitter, made, &event)) return false;
    for (int i = 0; i < arrlen(node->item); i++)
        if (!emit_scalar(emitter, node->key[i], false) || !emit_node(emitter, node->item[i])) return false;
    return emit(emitter, yaml_mapping_end_event_initialize(&event), &event);
}

static bool emit_document(yaml_emitter_t *emitter, const Yaml *root) {
    yaml_event_t event;
    return emit(emitter, yaml_stream_start_event_initialize(&event, YAML_UTF8_ENCODING), &event) &&
           emit(emitter, yaml_document_start_event_initialize(&event, NULL, NULL, NULL, 1), &event) &&
           emit_node(emitter, root) && emit(emitter, yaml_document_end_event_initialize(&event, 1), &event) &&
           emit(emitter, yaml_stream_end_event_initialize(&event), &event);
}

int yaml_save(const Yaml *root, const char *path, Err *err) {
    char *text = NULL;
    size_t len = 0;
    FILE *memory = open_memstream(&text, &len);
    yaml_emitter_t emitter;
    if (!memory || !yaml_emitter_initialize(&emitter)) {
        if (memory) fclose(memory);
        free(text);
        return fail(err, "%s: out of memory", path);
    }
    yaml_emitter_set_output_file(&emitter, memory);
    yaml_emitter_set_unicode(&emitter, 1);
    yaml_emitter_set_width(&emitter, -1); /* prompts are not folded */
    bool emitted = emit_document(&emitter, root);
    yaml_emitter_delete(&emitter);
    bool closed = !fclose(memory);
    int status = emitted && closed ? file_write(path, text, len, err)
                                   : fail(err, "%s: cannot write the sidecar: a value is not UTF-8", path);
    free(text);
    return status;
}

void yaml_set_number(Yaml *map, const char *dotted_path, double value) {
    char *text = xprintf("%.9g", value);
    yaml_set(map, dotted_path, text, false);
    free(text);
}
