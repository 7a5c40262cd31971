/* shapes.c - the models that this program is made for, as configurations without weights: what `nla bench --shape` takes. */
#include "nla.h"

#include <stdlib.h>
#include <string.h>

/* As the models' own config.json say it; what is not said is the class's default. */
static const Shape shapes[] = {
    {"qwen2.5-7b", 20, 150,
     "{\"model_type\": \"qwen2\", \"hidden_size\": 3584, \"num_hidden_layers\": 28, \"num_attention_heads\": 28, \"num_key_value_heads\": 4, "
     "\"intermediate_size\": 18944, \"vocab_size\": 152064, \"rope_theta\": 1e6, \"rms_norm_eps\": 1e-6, \"tie_word_embeddings\": false}"},
    {"qwen3-8b", 24, 150,
     "{\"model_type\": \"qwen3\", \"hidden_size\": 4096, \"num_hidden_layers\": 36, \"num_attention_heads\": 32, \"num_key_value_heads\": 8, "
     "\"head_dim\": 128, \"intermediate_size\": 12288, \"vocab_size\": 151936, \"rope_theta\": 1e6, \"rms_norm_eps\": 1e-6, "
     "\"tie_word_embeddings\": false}"},
    {"gemma-3-12b", 32, 80000,
     "{\"model_type\": \"gemma3_text\", \"hidden_size\": 3840, \"num_hidden_layers\": 48, \"num_attention_heads\": 16, "
     "\"num_key_value_heads\": 8, \"head_dim\": 256, \"intermediate_size\": 15360, \"vocab_size\": 262208, \"sliding_window\": 1024, "
     "\"rope_scaling\": {\"rope_type\": \"linear\", \"factor\": 8.0}}"},
    {"gemma-3-27b", 41, 60000,
     "{\"model_type\": \"gemma3_text\", \"hidden_size\": 5376, \"num_hidden_layers\": 62, \"num_attention_heads\": 32, "
     "\"num_key_value_heads\": 16, \"head_dim\": 128, \"intermediate_size\": 21504, \"vocab_size\": 262208, \"sliding_window\": 1024, "
     "\"query_pre_attn_scalar\": 168, \"rope_scaling\": {\"rope_type\": \"linear\", \"factor\": 8.0}}"},
    {"llama-3.3-70b", 53, 30,
     "{\"model_type\": \"llama\", \"hidden_size\": 8192, \"num_hidden_layers\": 80, \"num_attention_heads\": 64, \"num_key_value_heads\": 8, "
     "\"head_dim\": 128, \"intermediate_size\": 28672, \"vocab_size\": 128256, \"rope_theta\": 5e5, \"rms_norm_eps\": 1e-5, "
     "\"max_position_embeddings\": 131072, \"tie_word_embeddings\": false, \"rope_scaling\": {\"rope_type\": \"llama3\", \"factor\": 8.0, "
     "\"low_freq_factor\": 1.0, \"high_freq_factor\": 4.0, \"original_max_position_embeddings\": 8192}}"},
    {"smollm2-135m", 20, 0,
     "{\"model_type\": \"llama\", \"hidden_size\": 576, \"num_hidden_layers\": 30, \"num_attention_heads\": 9, \"num_key_value_heads\": 3, "
     "\"intermediate_size\": 1536, \"vocab_size\": 49152, \"rope_theta\": 1e5, \"rms_norm_eps\": 1e-5, \"max_position_embeddings\": 8192, "
     "\"tie_word_embeddings\": true}"},
    {"gemma-3-270m", 12, 0,
     "{\"model_type\": \"gemma3_text\", \"hidden_size\": 640, \"num_hidden_layers\": 18, \"num_attention_heads\": 4, "
     "\"num_key_value_heads\": 1, \"head_dim\": 256, \"intermediate_size\": 2048, \"vocab_size\": 262144, \"sliding_window\": 512}"},
};
enum { SHAPES = sizeof shapes / sizeof *shapes };

/* Of a model directory: its config.json, read at two thirds of the way up. */
static int shape_of_dir(Shape *shape, char **owned, const char *dir, Err *err) {
    char *path = xprintf("%s/config.json", dir);
    File file;
    Config c;
    int status = file_map(&file, path, err);
    if (status == 0) {
        status = config_parse(&c, file.data, file.len, path, err);
        *owned = xstrndup(file.data, file.len);
        *shape = (Shape){.name = dir, .layer = status == 0 ? 2 * c.n_layers / 3 : 0, .config = *owned};
        shape->layer = shape->layer < c.n_layers - 1 ? shape->layer : c.n_layers - 1;
        file_unmap(&file);
    }
    if (status == 0) {
        config_free(&c);
    }
    free(path);
    return status;
}

int shape_find(Shape *shape, char **owned, const char *name, Err *err) {
    *owned = NULL;
    for (int i = 0; i < SHAPES; i++) {
        if (strcmp(shapes[i].name, name) == 0) {
            *shape = shapes[i];
            return 0;
        }
    }
    if (strchr(name, '/')) {
        return shape_of_dir(shape, owned, name, err);
    }
    char *list = xstrdup(shapes[0].name);
    for (int i = 1; i < SHAPES; i++) {
        char *more = xprintf("%s, %s", list, shapes[i].name);
        free(list);
        list = more;
    }
    fail(err, "--shape %s: known are %s; or give a model's directory, such as ./DIR", name, list);
    free(list);
    return -1;
}
