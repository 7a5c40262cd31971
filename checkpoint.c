/* checkpoint.c - what a training run keeps on disk: RUN/checkpoint-STEP with the trained models as directories that other commands
 * open (av/, ar/), AdamW's moments, and state.json with the step and the XXH3 of every file. It is made under another name, synced
 * and renamed, so whatever happens a checkpoint is whole or not there, and the ones before it stay.
 */
#include "nla.h"

#include <dirent.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <stb/stb_ds.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

/* ------------------------------------------------------------------------------------------------ directories */

static int by_name(const void *a, const void *b) {
    return strcmp(*(char *const *)a, *(char *const *)b);
}

/* Every file under DIR/below, as its path from DIR on, sorted (stb; free_names). */
static char **list_files(const char *dir, const char *below) {
    char **names = NULL, *path = xprintf("%s%s", dir, below);
    DIR *d = opendir(path);
    for (struct dirent *entry; d && (entry = readdir(d));) {
        struct stat st;
        char *name = xprintf("%s/%s", below, entry->d_name), *full = xprintf("%s%s", dir, name);
        bool dots = strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0;
        if (!dots && stat(full, &st) == 0 && S_ISDIR(st.st_mode)) {
            char **inside = list_files(dir, name);
            for (int i = 0; i < (int)arrlen(inside); i++) {
                arrput(names, inside[i]);
            }
            arrfree(inside);
        } else if (!dots) {
            arrput(names, xstrdup(name));
        }
        free(name);
        free(full);
    }
    if (d) {
        closedir(d);
    }
    free(path);
    if (names) {
        qsort(names, arrlenu(names), sizeof *names, by_name);
    }
    return names;
}

static void free_names(char **names) {
    for (int i = 0; i < (int)arrlen(names); i++) {
        free(names[i]);
    }
    arrfree(names);
}

/* Steps of the whole checkpoints in a run, ascending (stb). */
static int64_t *checkpoint_steps(const char *run) {
    int64_t *steps = NULL;
    DIR *d = opendir(run);
    for (struct dirent *entry; d && (entry = readdir(d));) {
        char *end;
        long long step = strncmp(entry->d_name, "checkpoint-", 11) == 0 ? strtoll(entry->d_name + 11, &end, 10) : -1;
        if (step > 0 && !*end) {
            int i = (int)arrlen(steps);
            arrput(steps, step);
            for (; i > 0 && steps[i - 1] > step; i--) {
                steps[i] = steps[i - 1];
            }
            steps[i] = step;
        }
    }
    if (d) {
        closedir(d);
    }
    return steps;
}

bool checkpoint_any(const char *run) {
    int64_t *steps = checkpoint_steps(run);
    bool any = arrlen(steps) > 0;
    arrfree(steps);
    return any;
}

/* ------------------------------------------------------------------------------------------------ saving */

/* Read, not mapped: the pages of a large mapped file would count as this program's memory. */
static int hash_file(const char *path, uint64_t *hash, Err *err) {
    enum { CHUNK = 1 << 20 };
    FILE *in = fopen(path, "rb");
    if (!in) {
        return fail(err, "%s: %s", path, strerror(errno));
    }
    XXH3_state_t *state = XXH3_createState();
    char *chunk = xmalloc(CHUNK);
    size_t n;
    XXH3_64bits_reset(state);
    while ((n = fread(chunk, 1, CHUNK, in)) > 0) {
        XXH3_64bits_update(state, chunk, n);
    }
    int status = ferror(in) ? fail(err, "%s: %s", path, strerror(errno)) : 0;
    *hash = XXH3_64bits_digest(state);
    XXH3_freeState(state);
    free(chunk);
    fclose(in);
    return status;
}

int engine_save(Engine *e, const char *path, const Tensor *tensor, int n, Err *err) {
    Tensor *seen = xcalloc((size_t)n + 1, sizeof(Tensor));
    for (int i = 0; i < n; i++) {
        seen[i] = tensor[i];
        seen[i].data = e->view(e, tensor[i].data, tensor[i].bytes);
    }
    int status = e->check(e, err) == 0 ? safetensors_save(path, seen, n, err) : -1;
    for (int i = 0; i < n; i++) {
        e->unview(e, tensor[i].data, seen[i].data);
    }
    free(seen);
    return status;
}

static void put_moments(Tensor **list, const Params *p, const char *m, const char *v) {
    if (p->engine) {
        size_t bytes = p->count * dtype_size(p->moments);
        arrput(*list, ((Tensor){.name = m, .dtype = p->moments, .n_dims = 1, .shape = {(int64_t)p->count}, .data = p->m, .bytes = bytes}));
        arrput(*list, ((Tensor){.name = v, .dtype = p->moments, .n_dims = 1, .shape = {(int64_t)p->count}, .data = p->v, .bytes = bytes}));
    }
}

static int write_model(const TrainRun *r, const char *dir, const char *name, const char *base, Model *m, const Linear *head, Sidecar *meta, Err *err) {
    static const char *const stages[] = {"av_sft", "ar_sft", "rl"};
    char *path = xprintf("%s/%s", dir, name), step[32];
    int status = mkdir(path, 0777) == 0 ? 0 : fail(err, "%s: cannot make this directory: %s", path, strerror(errno));
    snprintf(step, sizeof step, "%lld", (long long)r->step);
    yaml_set(meta->yaml, "stage", stages[r->stage], false);
    yaml_set(meta->yaml, "training.step", step, false);
    yaml_set(meta->yaml, "training.data", r->s.data, true);
    yaml_set_number(meta->yaml, "extraction.var_nrm", r->var_nrm);
    yaml_set(meta->yaml, "created_by", "nla train", false);
    status = status == 0 ? model_write(path, base, m, head, meta->yaml, err) : -1;
    free(path);
    return status;
}

static int write_state(const TrainRun *r, const char *dir, Err *err) {
    char *text = NULL, *path = xprintf("%s/state.json", dir), **names = list_files(dir, "");
    size_t len = 0;
    FILE *out = open_memstream(&text, &len);
    fprintf(out, "{\"step\": %lld, \"av_step\": %lld, \"ar_step\": %lld, \"skipped\": %lld, \"best_step\": %lld", (long long)r->step,
            (long long)r->av_params.step, (long long)r->ar_params.step, (long long)r->skipped, (long long)r->best_step);
    if (isfinite(r->best)) {
        fprintf(out, ", \"best\": %.17g", r->best);
    }
    fputs(", \"xxh3\": {", out);
    int status = 0;
    for (int i = 0; i < (int)arrlen(names) && status == 0; i++) {
        char *file = xprintf("%s%s", dir, names[i]);
        uint64_t hash = 0;
        status = hash_file(file, &hash, err);
        fputs(i ? ", " : "", out);
        json_write_string(out, names[i], strlen(names[i]));
        fprintf(out, ": \"%016llx\"", (unsigned long long)hash);
        free(file);
    }
    fputs("}}\n", out);
    fclose(out);
    status = status == 0 ? file_write(path, text, len, err) : -1;
    free_names(names);
    free(text);
    free(path);
    return status;
}

static void prune(const TrainRun *r) {
    int64_t *steps = checkpoint_steps(r->s.out);
    for (int i = 0; i < (int)arrlen(steps) - r->s.keep; i++) {
        if (steps[i] != r->best_step) {
            char *path = xprintf("%s/checkpoint-%lld", r->s.out, (long long)steps[i]);
            remove_tree(path);
            free(path);
        }
    }
    arrfree(steps);
}

int checkpoint_save(TrainRun *r, Err *err) {
    char *final = xprintf("%s/checkpoint-%lld", r->s.out, (long long)r->step), *temp = xprintf("%s.tmp", final);
    remove_tree(temp); /* of a run that was killed while it saved */
    Tensor *list = NULL;
    int status = mkdir(temp, 0777) == 0 ? 0 : fail(err, "%s: cannot make this directory: %s", temp, strerror(errno));
    if (status == 0 && r->av_params.engine) {
        status = write_model(r, temp, "av", r->s.av, &r->av.model, NULL, &r->av.meta, err);
    }
    if (status == 0 && r->ar_params.engine) {
        status = write_model(r, temp, "ar", r->s.ar, &r->ar.model, &r->ar.head, &r->ar.meta, err);
    }
    if (status == 0) {
        put_moments(&list, &r->av_params, "av.m", "av.v");
        put_moments(&list, &r->ar_params, "ar.m", "ar.v");
        char *path = xprintf("%s/moments.safetensors", temp);
        status = engine_save(r->engine, path, list, (int)arrlen(list), err);
        free(path);
    }
    status = status == 0 ? write_state(r, temp, err) : -1;
    if (status == 0 && rename(temp, final) != 0) {
        status = fail(err, "%s: cannot rename %s to it: %s", final, temp, strerror(errno));
    }
    if (status == 0) {
        status = file_sync_dir(final, err);
        prune(r);
    } else {
        remove_tree(temp);
    }
    arrfree(list);
    free(temp);
    free(final);
    return status;
}

/* ------------------------------------------------------------------------------------------------ going on */

/* Every file against the sum that state.json has of it. */
static int verify(const char *dir, const Json *state, Err *err) {
    int sums = json_get(state, 0, "xxh3"), status = json_size(state, sums) > 0 ? 0 : fail(err, "%s: holds no checksums", state->file);
    for (int k = json_first(state, sums); k >= 0 && status == 0; k = json_next(state, k)) {
        char *name = json_string(state, k, NULL), *want = json_string(state, k + 1, NULL), *path = xprintf("%s%s", dir, name), have[20];
        uint64_t hash = 0;
        status = hash_file(path, &hash, err);
        snprintf(have, sizeof have, "%016llx", (unsigned long long)hash);
        if (status == 0 && strcmp(have, want ? want : "") != 0) {
            status = fail(err, "%s: checksum is %s, state.json says %s: the file is damaged", path, have, want ? want : "nothing");
        }
        free(name);
        free(want);
        free(path);
    }
    return status;
}

static int open_state(const char *dir, File *file, Json *state, Err *err) {
    char *path = xprintf("%s/state.json", dir);
    int status = file_map(file, path, err);
    if (status == 0 && json_parse(state, file->data, file->len, file->path, err) != 0) {
        file_unmap(file);
        status = -1;
    }
    free(path);
    return status;
}

static int check(const char *dir, Err *err) {
    File file;
    Json state;
    if (open_state(dir, &file, &state, err) != 0) {
        return -1;
    }
    int status = verify(dir, &state, err);
    json_free(&state);
    file_unmap(&file);
    return status;
}

char *checkpoint_latest(const TrainRun *r, Err *err) {
    int64_t *steps = checkpoint_steps(r->s.out);
    int n = (int)arrlen(steps);
    if (n == 0) {
        fail(err, "%s: there is no checkpoint to go on from; start without --resume", r->s.out);
        return NULL;
    }
    char *dir = xprintf("%s/checkpoint-%lld", r->s.out, (long long)steps[n - 1]);
    Err damage = {0};
    if (check(dir, &damage) != 0) {
        if (n > 1) {
            fail(err, "%.700s. The one before, checkpoint-%lld, is there: remove %s and --resume again", damage.msg, (long long)steps[n - 2], dir);
        } else {
            fail(err, "%.700s. There is no other checkpoint: start again with another out", damage.msg);
        }
        free(dir);
        dir = NULL;
    }
    arrfree(steps);
    return dir;
}

static int read_moments(const Safetensors *st, Params *p, const char *m, const char *v, Err *err) {
    if (!p->engine) {
        return 0;
    }
    const Tensor *tm = safetensors_find(st, m), *tv = safetensors_find(st, v);
    size_t bytes = p->count * dtype_size(p->moments);
    if (!tm || !tv || tm->dtype != p->moments || tv->dtype != p->moments || tm->bytes != bytes || tv->bytes != bytes) {
        return fail(err, "%s: %s and %s are not the %zu %s moments that these settings train", st->file[0].path, m, v, p->count,
                    dtype_name(p->moments));
    }
    p->engine->put(p->engine, p->m, tm->data, bytes);
    p->engine->put(p->engine, p->v, tv->data, bytes);
    return 0;
}

int checkpoint_load(TrainRun *r, const char *dir, Err *err) {
    File file;
    Json state;
    Safetensors st;
    if (open_state(dir, &file, &state, err) != 0) {
        return -1;
    }
    json_int(&state, json_get(&state, 0, "step"), &r->step);
    json_int(&state, json_get(&state, 0, "av_step"), &r->av_params.step);
    json_int(&state, json_get(&state, 0, "ar_step"), &r->ar_params.step);
    json_int(&state, json_get(&state, 0, "skipped"), &r->skipped);
    json_int(&state, json_get(&state, 0, "best_step"), &r->best_step);
    json_double(&state, json_get(&state, 0, "best"), &r->best);
    json_free(&state);
    file_unmap(&file);
    char *path = xprintf("%s/moments.safetensors", dir);
    int status = safetensors_open(&st, path, err);
    if (status == 0) {
        status = read_moments(&st, &r->av_params, "av.m", "av.v", err);
        status = status == 0 ? read_moments(&st, &r->ar_params, "ar.m", "ar.v", err) : -1;
        safetensors_close(&st);
    }
    free(path);
    return status;
}
