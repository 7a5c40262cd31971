/* config.json from anywhere: config_parse gives a usable Config or one line, never anything else. */
#include "../nla.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* What the loader and the ops rely on without looking again. */
static void check(const Config *c) {
    bool sound = c->hidden_size > 0 && c->n_layers > 0 && c->n_heads > 0 && c->n_kv_heads > 0 && c->head_dim > 0 &&
                 c->head_dim <= 1024 && c->head_dim % 2 == 0 && c->n_heads % c->n_kv_heads == 0 && c->ff_size > 0 &&
                 c->vocab_size > 0 && c->rms_norm_eps >= 0 && isfinite(c->attn_scale) && isfinite(c->embed_scale);
    for (int i = 0; i < c->n_layers && sound; i++) {
        sound = c->layer[i].window >= 0 && (c->layer[i].rope == 0 || c->layer[i].rope == 1);
    }
    for (int i = 0; i < 2; i++) {
        sound = sound && c->rope[i].theta > 0 && c->rope[i].linear_factor > 0;
    }
    if (!sound) {
        abort();
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    Config config;
    Err err = {0};
    if (config_parse(&config, (const char *)data, size, "config.json", &err) == 0) {
        check(&config);
        config_free(&config);
    } else if (!err.msg[0] || strchr(err.msg, '\n')) {
        abort();
    }
    return 0;
}
