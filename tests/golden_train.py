#!/usr/bin/env python3
"""Make what PyTorch computes when it trains the tiny AV/AR pairs: both SFT stages, full and by LoRA, and one RL step.

    $NLA_VENV/bin/python tests/golden_train.py        after golden_method.py, in the same environment; no argument

Reads tests/golden/pair_<family>/{av,ar} and writes beside them train.json, train.safetensors and two adapters in PEFT's
layout, lora_av/ and lora_ar/ (with a value_head.safetensors, a copy of the AR's). Everything is float32 with eager
attention, except mse_nrm and what follows from it up to the advantages, which are float64 before the last rounding (as
in golden_method.py). Every sequence is run by itself: no padding. Tensors are float32 or int64. D wide, n_i tokens:

    vectors                       [4, D]  stored raw; their norms are 1, 5, 20 and 60
    response_ids_0 .. _3          [n_i]   `<explanation>`, newline, text, newline, `</explanation>`, end-of-turn token
    ar_ids_0 .. _3                [n_i]   the filled AR template, with BOS where the tokenizer has one
    lr                            [10]    of steps 1..10

Four runs of 10 AdamW steps, each on all 4 rows as one batch: `av` and `ar` train every parameter (of the AR: not a
final norm, which it does not use), `av_lora` and `ar_lora` the adapter's A and B, and for the AR also the value head.

    <run>.loss, <run>.grad_norm   [10]    before each step; the norm before clipping
    <run>.grad.<name>                     at step 1, before clipping
    <run>.after.<name>                    the parameter after 10 steps

<name> is the one in the checkpoint's file (a tied lm_head is the embeddings') or in the adapter's; the value head is
`value_head.weight`. The AV's loss is the sum of the cross entropies of all response tokens over their number, the AR's
the mean of the rows' mse_nrm.

One RL step from fixed samples, 3 groups of 4. Policy: the AV with lora_av; reference: the AV alone; reward: the AR with
lora_ar. Samples end at the end-of-turn token or at the cap (`rl_cap` of train.json). Group 2 has no explanation at all.

    rl.vectors                    [3, D]  the first three
    rl.ids_0 .. _11               [n_i]
    rl.status                     [12]    0 valid, 1 failed (no closing tag), 2 truncated
    rl.logp_i, rl.ref_i           [n_i]   log-probabilities under the policy and the reference, temperature 1
    rl.old_i                      [n_i]   logp + 0.2 noise
    rl.mse                        [12]    mse_nrm; NaN where status is not 0
    rl.reward                     [12]    -mse, or -2
    rl.reward_log                 [12]    -log(mse), or -log 2
    rl.reward_length              [12]    rl.reward - 0.001 n_i
    rl.advantage                  [12]    of rl.reward
    rl.policy_loss, rl.kl         [1]     means over all 12 samples of means over their tokens
    rl.grad.<name>                        of policy_loss + 0.05 kl
    rl.ar_loss                    [1]     mean mse_nrm of the valid samples
    rl.ar_grad.<name>                     of ar_loss

For llama also rl_full.{old_i, policy_loss, kl, grad.<name>}, on the same samples and advantages: the policy is the AV
alone, all its parameters trained; reference: the AV with lora_av. Their log-probabilities are rl.ref_i and rl.logp_i.

train.json: `explanations` (4 texts), `rl_explanations` (12, null where status is not 0), `rl_cap`.
"""

import golden  # first: it sets what PyTorch must see before it is imported
import golden_method

import math
import shutil
import sys
from dataclasses import dataclass

import torch
import transformers
from safetensors.torch import load_file, save_file

NORMS = torch.tensor([1.0, 5.0, 20.0, 60.0])

BETAS = (0.9, 0.95)
EPSILON = 1e-8
WEIGHT_DECAY = 0.1
MAX_GRAD_NORM = 1.0
N_STEPS = 10
WARM_UP = 3
PEAK_LR = 1e-3
FINAL_LR = 1e-4

GROUP_SIZE = 4
RL_CAP = 32
CLIP = 0.2
KL_COEFFICIENT = 0.05
LENGTH_PENALTY = 0.001
OLD_NOISE = 0.2
MAX_EXPONENT = 10.0

# A ratio this close to a bound of the clip could fall on its other side in another order of summation.
MIN_CLIP_MARGIN = 1e-4

# ---------------------------------------------------------------------------------------------------------------------
# Texts

EXPLANATIONS = [*golden_method.EXPLANATIONS, "A short list of first words"]

OPEN, CLOSE = "<explanation>\n", "\n</explanation>"

VALID, FAILED, TRUNCATED = 0, 1, 2

# What each sample holds; the kind says how it ends. A truncated one goes on to the cap, wherever that cuts it.
SAMPLES = [
    (VALID, OPEN + "It stands" + CLOSE),
    (VALID, OPEN + "A language model, and words between the two" + CLOSE),
    (FAILED, OPEN + "The last token was"),
    (VALID, OPEN + "Two lists.\n\nA name next." + CLOSE),
    (VALID, OPEN + "Say: 3 words" + CLOSE),
    # Closed in time, and still truncated.
    (TRUNCATED, OPEN + "The text must follow" + CLOSE + "\nSay it: 1, 2, 3, 4, 5, 6, 7, 8, 9"),
    (VALID, OPEN + "First the concept, then what must follow it in the text: a vector" + CLOSE),
    (VALID, OPEN + "J" + CLOSE),
    (FAILED, "and the last token follows"),
    (TRUNCATED, OPEN + "A letter that thanks a friend for his short visit, and then for two more"),
    (FAILED, OPEN + "What had been read was a vector, or"),
    (TRUNCATED, OPEN + "Two words" + CLOSE + "\nIt stands below: 9, 8, 7, 6, 5, 4, 3, 2, 1"),
]

# ---------------------------------------------------------------------------------------------------------------------
# Adapters

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Adapter:
    r: int
    alpha: int
    rank_stabilised: bool
    targets: tuple

    @property
    def scale(self):
        return self.alpha / (math.sqrt(self.r) if self.rank_stabilised else self.r)


ADAPTERS = {
    "llama": Adapter(r=4, alpha=8, rank_stabilised=True, targets=ATTENTION + MLP),
    "qwen2": Adapter(r=4, alpha=4, rank_stabilised=False, targets=("q_proj", "v_proj")),
    "qwen3": Adapter(r=2, alpha=8, rank_stabilised=True, targets=ATTENTION + MLP),
    "gemma3": Adapter(r=4, alpha=8, rank_stabilised=False, targets=("o_proj", "gate_proj", "down_proj")),
}


class LoraLinear(torch.nn.Module):
    def __init__(self, base, a, b, scale):
        super().__init__()
        self.base, self.a, self.b, self.scale = base, a, b, scale

    def forward(self, x):
        return self.base(x) + self.scale * torch.nn.functional.linear(torch.nn.functional.linear(x, self.a), self.b)


def target_layers(text_model, adapter):
    """Each linear layer that the adapter has an A and a B for: its parent, its name there, its path in the model."""
    for i, block in enumerate(text_model.layers):
        for parent, children in (("self_attn", ATTENTION), ("mlp", MLP)):
            for child in children:
                if child in adapter.targets:
                    yield block.get_submodule(parent), child, f"layers.{i}.{parent}.{child}"


def write_adapter(directory, adapter, text_model, prefix, base, generator):
    """Both matrices random: PEFT starts from B = 0, where A's gradient would be zero."""
    directory.mkdir()
    weights = {}
    for parent, child, path in target_layers(text_model, adapter):
        linear = parent.get_submodule(child)
        a = torch.randn(adapter.r, linear.in_features, generator=generator) / linear.in_features**0.5
        weights[f"{prefix}{path}.lora_A.weight"] = a
        weights[f"{prefix}{path}.lora_B.weight"] = 0.05 * torch.randn(
            linear.out_features, adapter.r, generator=generator
        )
    save_file(weights, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": False,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": adapter.r,
        "target_modules": list(adapter.targets),
        "task_type": "CAUSAL_LM",
        "use_rslora": adapter.rank_stabilised,
    }
    golden.write_json(directory / "adapter_config.json", config)


def add_adapter(directory, adapter, text_model, prefix):
    """Put the adapter into the model, freeze the rest, and return the adapter's parameters under PEFT's names."""
    text_model.requires_grad_(False)
    weights = load_file(directory / "adapter_model.safetensors")
    parameters = {name: torch.nn.Parameter(weight) for name, weight in weights.items()}
    for parent, child, path in target_layers(text_model, adapter):
        a, b = (parameters[f"{prefix}{path}.lora_{letter}.weight"] for letter in "AB")
        setattr(parent, child, LoraLinear(parent.get_submodule(child), a, b, adapter.scale))
        weights.pop(f"{prefix}{path}.lora_A.weight")
        weights.pop(f"{prefix}{path}.lora_B.weight")
    require(not weights, f"{directory}: {sorted(weights)} belong to no layer")
    return parameters


# ---------------------------------------------------------------------------------------------------------------------
# Models


def require(condition, message):
    if not condition:
        sys.exit(f"golden_train.py: {message}")


@dataclass(frozen=True)
class Family:
    """A pair, its directory, and what its AV prompt is."""

    name: str
    pair: golden_method.Pair
    prompt_ids: list
    position: int

    @property
    def directory(self):
        return golden.GOLDEN / f"pair_{self.name}"

    @property
    def adapter(self):
        return ADAPTERS[self.name]

    @property
    def av_is_wrapper(self):
        return self.pair.av_config["model_type"] == "gemma3"

    @property
    def av_lora_prefix(self):
        """transformers has the wrapper's text model at model.language_model; its files, language_model.model."""
        return "base_model.model.model." + ("language_model." if self.av_is_wrapper else "")


AR_LORA_PREFIX = "base_model.model.model."


def check_names(directory, parameters, left_out):
    """The parameters must be the tensors of the checkpoint's file, but for what is left out on purpose."""
    names = {name for name in load_file(directory / "model.safetensors") if not left_out(name)}
    require(names == set(parameters), f"{directory}: trained and stored: {sorted(names ^ set(parameters))}")


class Av:
    def __init__(self, family, adapter=False):
        self.family = family
        model = golden.load_reference(family.directory / "av", golden.Case(family.pair.av_config, family.pair.seed))
        self.text_model = model.model.language_model if family.av_is_wrapper else model.model
        self.lm_head = model.lm_head
        if adapter:
            self.lm_head.requires_grad_(False)
            self.parameters = add_adapter(
                family.directory / "lora_av", family.adapter, self.text_model, family.av_lora_prefix
            )
            return
        prefix = "language_model." if family.av_is_wrapper else ""
        self.parameters = {f"{prefix}model.{name}": p for name, p in self.text_model.named_parameters()}
        if self.lm_head.weight is not self.text_model.embed_tokens.weight:
            self.parameters[f"{prefix}lm_head.weight"] = self.lm_head.weight
        check_names(family.directory / "av", self.parameters, lambda name: name.startswith(("vision", "multi_modal")))

    def log_probabilities(self, vector, response):
        """Of every token of the response: the first is predicted from the prompt's last token."""
        prompt = self.family.prompt_ids
        ids = torch.tensor([*prompt, *response])
        scale = self.family.pair.injection_scale
        embeddings = golden_method.injected(self.text_model, ids, self.family.position, vector, scale)
        states = self.text_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state[0]
        logits = self.lm_head(states[len(prompt) - 1 : -1])
        return logits.log_softmax(dim=-1).gather(1, ids[len(prompt) :, None])[:, 0]


class Ar:
    def __init__(self, family, adapter=False):
        directory = family.directory / "ar"
        self.text_model = transformers.AutoModel.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.text_model.norm = torch.nn.Identity()
        head = load_file((family.directory / "lora_ar" if adapter else directory) / "value_head.safetensors")
        self.head = torch.nn.Parameter(head["weight"])
        mse_scale = family.pair.mse_scale
        self.norm = mse_scale if isinstance(mse_scale, float) else self.head.shape[0] ** 0.5
        if adapter:
            self.parameters = add_adapter(family.directory / "lora_ar", family.adapter, self.text_model, AR_LORA_PREFIX)
        else:
            self.parameters = {f"model.{name}": p for name, p in self.text_model.named_parameters()}
            check_names(directory, self.parameters, lambda name: name == "model.norm.weight")
        self.parameters["value_head.weight"] = self.head

    def predict(self, ids):
        return self.head @ self.text_model(torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1]

    def mse_nrm(self, ids, vector):
        def n(x):
            return self.norm * x / x.norm()

        return (n(self.predict(ids).double()) - n(vector.double())).square().mean()


def ar_ids(tokenizer, text):
    return tokenizer(golden_method.AR_TEMPLATE.replace("{explanation}", text))["input_ids"]


# ---------------------------------------------------------------------------------------------------------------------
# SFT


def learning_rate(step):
    if step <= WARM_UP:
        return PEAK_LR * step / WARM_UP
    turn = math.pi * (step - WARM_UP) / (N_STEPS - WARM_UP)
    return FINAL_LR + (PEAK_LR - FINAL_LR) / 2 * (1 + math.cos(turn))


def gradients(loss, parameters, prefix):
    """Of every parameter; each must be one that a test can fail on."""
    grads = dict(zip(parameters, torch.autograd.grad(loss, parameters.values())))
    for name, grad in grads.items():
        require(grad.isfinite().all() and grad.abs().max() > 1e-6, f"{prefix}: no use as a gradient: {name}")
    return {f"{prefix}.{name}": grad for name, grad in grads.items()}


def train(run, parameters, loss_of):
    optimizer = torch.optim.AdamW(parameters.values(), betas=BETAS, eps=EPSILON, weight_decay=WEIGHT_DECAY)
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    tensors = gradients(loss_of(), parameters, f"{run}.grad")
    losses, norms = [], []
    for step in range(1, N_STEPS + 1):
        optimizer.param_groups[0]["lr"] = learning_rate(step)
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters.values(), MAX_GRAD_NORM))
        optimizer.step()
        losses.append(loss.detach().float())
    require(losses[-1] < losses[0], f"{run}: the loss does not fall")
    tensors |= {f"{run}.loss": torch.stack(losses), f"{run}.grad_norm": torch.stack(norms)}
    for name, parameter in parameters.items():
        require(not torch.equal(parameter, start[name]), f"{run}: {name} did not move")
        tensors[f"{run}.after.{name}"] = parameter.detach()
    return tensors


def train_av(run, av, vectors, responses):
    def loss():
        rows = [av.log_probabilities(vector, response) for vector, response in zip(vectors, responses)]
        return -torch.cat(rows).sum() / sum(map(len, responses))

    return train(run, av.parameters, loss)


def train_ar(run, ar, vectors, inputs):
    def loss():
        return torch.stack([ar.mse_nrm(ids, vector) for ids, vector in zip(inputs, vectors)]).mean()

    return train(run, ar.parameters, loss)


# ---------------------------------------------------------------------------------------------------------------------
# RL


def make_sample(tokenizer, end, kind, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if kind == TRUNCATED:
        require(len(ids) >= RL_CAP, f"{text!r} has {len(ids)} tokens only: it does not reach the cap")
        return ids[:RL_CAP]
    require(len(ids) < RL_CAP, f"{text!r} has {len(ids)} tokens: it reaches the cap")
    return [*ids, end]


def make_samples(tokenizer, end):
    """Ids, and the explanation of each valid one; the kinds are checked on what the ids say."""
    samples = [make_sample(tokenizer, end, kind, text) for kind, text in SAMPLES]
    explanations = []
    for (kind, _), ids in zip(SAMPLES, samples):
        text = tokenizer.decode([i for i in ids if i != end])
        ended, closed = ids[-1] == end, "</explanation>" in text
        status = (VALID if closed else FAILED) if ended else TRUNCATED
        require(status == kind, f"{text!r} is of kind {status}, not {kind}")
        explanations.append(text.split("<explanation>")[1].split("</explanation>")[0].strip() if not status else None)
    truncated = [tokenizer.decode(ids) for (kind, _), ids in zip(SAMPLES, samples) if kind == TRUNCATED]
    require(any("</explanation>" in text for text in truncated), "no sample is truncated after its closing tag")
    return samples, explanations


def advantages(rewards):
    groups = rewards.view(-1, GROUP_SIZE)
    std = groups.std(dim=1, keepdim=True)
    return torch.where(std == 0, 0.0, (groups - groups.mean(dim=1, keepdim=True)) / (std + 1e-6)).flatten()


def rl_rewards(statuses, mse, lengths):
    mse = torch.tensor([math.nan if value is None else value for value in mse], dtype=torch.float64)
    valid = torch.tensor(statuses) == VALID
    reward = torch.where(valid, -mse, -2.0)
    spread = reward.view(-1, GROUP_SIZE).std(dim=1)
    require((spread[:2] > 0.05).all() and spread[2] == 0, f"the spread of the rewards in each group: {spread}")
    return {
        "mse": mse,
        "reward": reward,
        "reward_log": torch.where(valid, -mse.log(), -math.log(2.0)),
        "reward_length": reward - LENGTH_PENALTY * torch.tensor(lengths),
        "advantage": advantages(reward),
    }


def policy_loss(advantage, logp, old, clip=CLIP):
    """The mean over samples of the mean over their tokens."""
    means = []
    for a, new, before in zip(advantage, logp, old):
        rho = (new - before).clamp(-MAX_EXPONENT, MAX_EXPONENT).exp()
        means.append(torch.maximum(-rho * a, -rho.clamp(1 - clip, 1 + clip) * a).mean())
    return torch.stack(means).mean()


def k3(logp, ref):
    means = []
    for new, other in zip(logp, ref):
        d = (other - new).clamp(-MAX_EXPONENT, MAX_EXPONENT)
        means.append((d.exp() - 1 - d).mean())
    return torch.stack(means).mean()


def av_step(run, parameters, advantage, logp, ref, generator):
    """The old log-probabilities, both losses, and the gradients of their sum."""
    advantage = advantage.float()
    old = [row.detach() + OLD_NOISE * torch.randn(len(row), generator=generator) for row in logp]
    rho = torch.cat([(new - before).detach() for new, before in zip(logp, old)]).exp()
    margin = torch.minimum((rho - (1 - CLIP)).abs(), (rho - (1 + CLIP)).abs()).min()
    require(margin > MIN_CLIP_MARGIN, f"{run}: a ratio is {margin:.1e} from the clip's bound: take another seed")
    require((rho < 1 - CLIP).any() and (rho > 1 + CLIP).any(), f"{run}: no ratio is clipped on one side")

    policy, kl = policy_loss(advantage, logp, old), k3(logp, ref)
    unclipped = policy_loss(advantage, logp, old, clip=math.inf)
    require((policy - unclipped).abs() > 1e-3, f"{run}: the clip changes nothing")
    require(kl > 1e-3, f"{run}: kl is {kl:.1e}")
    return {
        **{f"{run}.old_{i}": row for i, row in enumerate(old)},
        f"{run}.policy_loss": policy.detach()[None],
        f"{run}.kl": kl.detach()[None],
        **gradients(policy + KL_COEFFICIENT * kl, parameters, f"{run}.grad"),
    }


def rl_step(family, vectors, samples, inputs):
    """`inputs` are the ids of the filled AR templates, None for a sample without an explanation."""
    golds = vectors.repeat_interleave(GROUP_SIZE, dim=0)
    statuses = [kind for kind, _ in SAMPLES]
    ar = Ar(family, adapter=True)
    mse = [None if ids is None else ar.mse_nrm(ids, gold) for ids, gold in zip(inputs, golds)]
    ar_loss = torch.stack([value for value in mse if value is not None]).mean()
    rewards = rl_rewards(statuses, [None if value is None else value.item() for value in mse], [*map(len, samples)])

    policy, bare = Av(family, adapter=True), Av(family)
    logp = [policy.log_probabilities(gold, ids) for gold, ids in zip(golds, samples)]
    ref = [bare.log_probabilities(gold, ids) for gold, ids in zip(golds, samples)]
    frozen = {"logp": [row.detach() for row in logp], "ref": [row.detach() for row in ref]}
    tensors = {
        "rl.vectors": vectors,
        **{f"rl.ids_{i}": torch.tensor(ids) for i, ids in enumerate(samples)},
        "rl.status": torch.tensor(statuses),
        **{f"rl.{name}_{i}": row for name, rows in frozen.items() for i, row in enumerate(rows)},
        **{f"rl.{name}": value.float() for name, value in rewards.items()},
        "rl.ar_loss": ar_loss.detach().float()[None],
        **gradients(ar_loss, ar.parameters, "rl.ar_grad"),
    }
    seed, advantage = family.pair.seed, rewards["advantage"]
    noise = golden_method.generator(seed, 8)
    tensors |= av_step("rl", policy.parameters, advantage, logp, frozen["ref"], noise)
    if family.name == "llama":
        noise = golden_method.generator(seed, 9)
        tensors |= av_step("rl_full", bare.parameters, advantage, ref, frozen["logp"], noise)
    return tensors


# ---------------------------------------------------------------------------------------------------------------------


def load_family(name, pair, tokenizer, inputs):
    _, prompt_ids = golden_method.av_prompt(tokenizer)
    facts = golden_method.token_facts(tokenizer, prompt_ids, inputs)
    return Family(name, pair, prompt_ids, facts["position"])


def write_adapters(family):
    seed, adapter, base = family.pair.seed, family.adapter, f"random/{family.pair.ar_config['model_type']}"
    av, ar = (family.directory / name for name in ("lora_av", "lora_ar"))
    for directory in (av, ar):
        shutil.rmtree(directory, ignore_errors=True)
    generator = golden_method.generator(seed, 6)
    write_adapter(av, adapter, Av(family).text_model, family.av_lora_prefix, base, generator)
    generator = golden_method.generator(seed, 7)
    write_adapter(ar, adapter, Ar(family).text_model, AR_LORA_PREFIX, base, generator)
    shutil.copyfile(family.directory / "ar" / "value_head.safetensors", ar / "value_head.safetensors")


def train_family(name, pair):
    tokenizer = golden_method.load_tokenizer(golden.GOLDEN / f"pair_{name}" / "av")
    inputs = [ar_ids(tokenizer, text) for text in EXPLANATIONS]
    family = load_family(name, pair, tokenizer, inputs)
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>" if pair.tokenizer == "gemma" else "<|im_end|>")
    responses = [[*tokenizer(OPEN + text + CLOSE, add_special_tokens=False)["input_ids"], end] for text in EXPLANATIONS]
    for rows in (inputs, responses):
        require(len(set(map(len, rows))) == len(rows), f"{name}: two rows have one length")
    samples, explanations = make_samples(tokenizer, end)

    directions = torch.randn(len(NORMS), pair.ar_config["hidden_size"], generator=golden_method.generator(pair.seed, 5))
    vectors = directions / directions.norm(dim=1, keepdim=True) * NORMS[:, None]
    write_adapters(family)
    tensors = {
        "vectors": vectors,
        **{f"response_ids_{i}": torch.tensor(ids) for i, ids in enumerate(responses)},
        **{f"ar_ids_{i}": torch.tensor(ids) for i, ids in enumerate(inputs)},
        "lr": torch.tensor([learning_rate(step) for step in range(1, N_STEPS + 1)]),
        **train_av("av", Av(family), vectors, responses),
        **train_ar("ar", Ar(family), vectors, inputs),
        **train_av("av_lora", Av(family, adapter=True), vectors, responses),
        **train_ar("ar_lora", Ar(family, adapter=True), vectors, inputs),
        **rl_step(
            family,
            vectors[: len(SAMPLES) // GROUP_SIZE].clone(),
            samples,
            [None if text is None else ar_ids(tokenizer, text) for text in explanations],
        ),
    }
    save_file(tensors, family.directory / "train.safetensors")
    texts = {"explanations": EXPLANATIONS, "rl_explanations": explanations, "rl_cap": RL_CAP}
    golden.write_json(family.directory / "train.json", texts)


def main():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.backends.mkldnn.enabled = False
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    size = 0
    for name, pair in golden_method.PAIRS.items():
        directory = golden.GOLDEN / f"pair_{name}"
        require((directory / "av").is_dir(), f"{directory}: not there: run golden_method.py first")
        train_family(name, pair)
        made = [*directory.glob("train.*"), *directory.glob("lora_*/*")]
        size += sum(file.stat().st_size for file in made)
    print(f"{len(golden_method.PAIRS)} trained pairs in {golden.GOLDEN}, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
