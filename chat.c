/* chat.c - a conversation as the model's chat template writes it.
 *
 * The Jinja templates are not run: the families (ChatML as SmolLM2, Qwen2.5 and Qwen3 have it, Llama 3 and 3.1, Gemma
 * 3) are known by the marks in their templates, and each is written by a function of its own. A template with other
 * marks is refused. tests/tokenizer_parity.py compares the renderings with Jinja's.
 */
#include "tokenizer.h"

#include <stdlib.h>
#include <string.h>

#include <stb/stb_ds.h>

static void append_text(char **out, const char *text) {
    append(out, text, strlen(text));
}

/* Python's str.strip, which Jinja's trim is: Unicode spaces and the separators U+001C..U+001F. */
static void append_trimmed(char **out, const char *text) {
    size_t start = 0, end = strlen(text), step;
    int cp;
    for (; start < end; start += step) {
        step = read_char(text + start, end - start, &cp);
        if (!is_space(cp) && !(cp >= 0x1C && cp <= 0x1F)) break;
    }
    for (; end > start; end = step) {
        step = char_before(text, end);
        read_char(text + step, end - step, &cp);
        if (!is_space(cp) && !(cp >= 0x1C && cp <= 0x1F)) break;
    }
    append(out, text + start, end - start);
}

static bool has_role(const ChatMessage *message, const char *role) {
    return !strcmp(message->role, role);
}

/* The default system message, which the template's text names as '<|im_start|>system\n...<|im_end|>': to be freed, NULL
 * when there is none. Jinja's string literals escape \n, \' and \\. */
static char *default_system(const char *template) {
    static const char marker[] = "<|im_start|>system";
    for (const char *at = template; (at = strstr(at, marker)); at++) {
        const char *p = at + sizeof marker - 1, *end = strstr(p, "<|im_end|>");
        char quote = at > template ? at[-1] : '\0';
        bool literal = quote == '\'' || quote == '"';
        char *text = NULL;
        while (end && p < end && *p != (literal ? quote : '{')) {
            bool escape = literal && *p == '\\';
            p += escape;
            arrput(text, escape && *p == 'n' ? '\n' : *p);
            p++;
        }
        char *system = p == end && arrlen(text) && text[0] == '\n' ? xstrndup(text + 1, arrlenu(text) - 1) : NULL;
        arrfree(text);
        if (system) return system;
    }
    return NULL;
}

static void append_chatml(char **out, const char *role, const char *content) {
    append_text(out, "<|im_start|>");
    append_text(out, role);
    append_text(out, "\n");
    append_text(out, content);
    append_text(out, "<|im_end|>\n");
}

/* The place of the last user message that is not a tool's answer; n - 1 when there is none. */
static int last_query(const ChatMessage *message, int n) {
    static const char open[] = "<tool_response>", close[] = "</tool_response>";
    for (int i = n - 1; i >= 0; i--) {
        size_t len = strlen(message[i].content);
        bool tool = len >= sizeof close - 1 && !strncmp(message[i].content, open, sizeof open - 1) &&
                    !strcmp(message[i].content + len - (sizeof close - 1), close);
        if (has_role(&message[i], "user") && !tool) return i;
    }
    return n - 1;
}

/* Qwen3's assistant turn: the thoughts between <think> and </think> are cut off, and written again only in the turns
 * after the last question: in the very last one always, else when there are any. */
static void append_qwen3_assistant(char **out, const char *content, bool after_query, bool last) {
    static const char open[] = "<think>", close[] = "</think>";
    const char *thought = "", *answer = content, *end = strstr(content, close);
    size_t thought_len = 0;
    if (end) {
        for (const char *p = end; (p = strstr(p, close)); p += sizeof close - 1) answer = p + sizeof close - 1;
        answer += strspn(answer, "\n");
        for (; end > content && end[-1] == '\n'; end--) {}
        thought = content;
        for (const char *p = content; (p = strstr(p, open)) && p + sizeof open - 1 <= end;)
            thought = p += sizeof open - 1;
        for (; thought < end && *thought == '\n'; thought++) {}
        thought_len = (size_t)(end - thought);
    }
    append_text(out, "<|im_start|>assistant\n");
    if (after_query && (last || thought_len)) {
        append_text(out, "<think>\n");
        append(out, thought, thought_len);
        append_text(out, "\n</think>\n\n");
        answer += strspn(answer, "\n");
    }
    append_text(out, answer);
    append_text(out, "<|im_end|>\n");
}

static int render_chatml(const Tokenizer *tok, const ChatMessage *message, int n, bool generation_prompt, bool qwen3,
                         char **out) {
    char *system = has_role(&message[0], "system") ? NULL : default_system(tok->chat_template);
    int query = last_query(message, n);
    if (system) append_chatml(out, "system", system);
    free(system);
    for (int i = 0; i < n; i++) {
        if (qwen3 && has_role(&message[i], "assistant"))
            append_qwen3_assistant(out, message[i].content, i > query, i == n - 1);
        else
            append_chatml(out, message[i].role, message[i].content);
    }
    if (generation_prompt) append_text(out, "<|im_start|>assistant\n");
    return 0;
}

static void append_llama3(char **out, const char *role, const char *before, const char *content) {
    append_text(out, "<|start_header_id|>");
    append_text(out, role);
    append_text(out, "<|end_header_id|>\n\n");
    append_text(out, before);
    append_trimmed(out, content);
    append_text(out, "<|eot_id|>");
}

/* Llama 3.1 and later always open with a system turn that names the dates (`dated`); Llama 3 does not. */
static int render_llama3(const Tokenizer *tok, const ChatMessage *message, int n, bool generation_prompt, bool dated,
                         const char *date, char **out) {
    int first = 0;
    if (tok->bos_text) append_text(out, tok->bos_text);
    if (dated) {
        char *dates = xprintf("Cutting Knowledge Date: December 2023\nToday Date: %s\n\n", date ? date : "26 Jul 2024");
        if (has_role(&message[0], "system")) first = 1;
        append_llama3(out, "system", dates, first ? message[0].content : "");
        free(dates);
    }
    for (int i = first; i < n; i++) append_llama3(out, message[i].role, "", message[i].content);
    if (generation_prompt) append_text(out, "<|start_header_id|>assistant<|end_header_id|>\n\n");
    return 0;
}

static int render_gemma3(const Tokenizer *tok, const ChatMessage *message, int n, bool generation_prompt, char **out,
                         Err *err) {
    int first = has_role(&message[0], "system") ? 1 : 0;
    if (tok->bos_text) append_text(out, tok->bos_text);
    for (int i = first; i < n; i++) {
        bool even = (i - first) % 2 == 0;
        if (has_role(&message[i], "user") != even)
            return fail(err, "Conversation roles must alternate user/assistant/user/assistant/...");
        append_text(out, "<start_of_turn>");
        append_text(out, has_role(&message[i], "assistant") ? "model" : message[i].role);
        append_text(out, "\n");
        if (first && i == 1) {
            append_text(out, message[0].content);
            append_text(out, "\n\n");
        }
        append_trimmed(out, message[i].content);
        append_text(out, "<end_of_turn>\n");
    }
    if (generation_prompt) append_text(out, "<start_of_turn>model\n");
    return 0;
}

static bool names_any(const char *template, const char *const words[], int n) {
    for (int i = 0; i < n; i++)
        if (strstr(template, words[i])) return true;
    return false;
}

/* ChatML templates come in kinds; what is not Qwen3's must be the plain one, without any of these. */
static bool plain_chatml(const char *template) {
    static const char *const beyond[] = {"trim",    "strip(",    "raise_exception", "bos_token", "strftime",
                                         "<think>", "reasoning", "enable_thinking", "macro"};
    return !names_any(template, beyond, LENGTH(beyond));
}

/* Qwen3's template, but not those that make the model think or not think in other ways. */
static bool qwen3_chatml(const char *template) {
    return strstr(template, "ns.last_query_index") && strstr(template, "reasoning_content.strip('\\n')") &&
           strstr(template, "enable_thinking is false") && !strstr(template, "<|im_start|>assistant\\n<think>");
}

static int render(const Tokenizer *tok, const ChatMessage *message, int n, bool generation_prompt, const char *date,
                  char **out, Err *err) {
    const char *template = tok->chat_template;
    if (strstr(template, "<|im_start|>") && (plain_chatml(template) || qwen3_chatml(template)))
        return render_chatml(tok, message, n, generation_prompt, !plain_chatml(template), out);
    if (strstr(template, "<|start_header_id|>")) {
        bool dated = strstr(template, "Cutting Knowledge Date: December 2023\\nToday Date: ") ||
                     (strstr(template, "Cutting Knowledge Date: December 2023") && strstr(template, "Today Date: "));
        if (dated || !strstr(template, "Today Date"))
            return render_llama3(tok, message, n, generation_prompt, dated, date, out);
    }
    if (strstr(template, "<start_of_turn>") && strstr(template, "first_user_prefix"))
        return render_gemma3(tok, message, n, generation_prompt, out, err);
    return fail(err,
                "%s: chat_template: is none of those implemented: ChatML as SmolLM2, Qwen2.5 and Qwen3 have it, "
                "Llama 3 and 3.1, Gemma 3",
                tok->config_file);
}

char *chat_render(const Tokenizer *tok, const ChatMessage *message, int n, bool generation_prompt, const char *date,
                  Err *err) {
    static const char *const roles[] = {"system", "user", "assistant"};
    if (!tok->chat_template) {
        fail(err, "%s: chat_template: is missing", tok->config_file ? tok->config_file : "tokenizer_config.json");
        return NULL;
    }
    if (n < 1) {
        fail(err, "a conversation needs a message");
        return NULL;
    }
    for (int i = 0; i < n; i++) {
        int r = 0;
        while (r < LENGTH(roles) && strcmp(message[i].role, roles[r])) r++;
        if (r < LENGTH(roles)) continue;
        fail(err, "message %d: the role \"%.40s\" is none of system, user, assistant", i, message[i].role);
        return NULL;
    }
    char *out = NULL;
    int rc = render(tok, message, n, generation_prompt, date, &out, err);
    char *text = rc ? NULL : xstrndup(out, arrlenu(out));
    arrfree(out);
    return text;
}
