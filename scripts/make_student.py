"""Grow the tiny student: a Qwen3-shaped chat model of about a million and a half parameters, from text of ours alone.

Three steps, each a plain function: write conversations (the corpus's training part and what the seeded grammar
grows), learn a byte-pair tokenizer from them, train the model on them. The student is no assistant. It exists so
that the whole line (supervised, preferences, evaluation, serving) runs offline in minutes, and so it must know
just enough: to answer in short English with good and with poor manners, to keep one manner through a reply, and
to see that many wordings ask for the same fact.

    python scripts/make_student.py                # about a quarter of an hour on two cores

The same machine makes the same bytes: one seed, no clock, fixed order.
"""

import argparse
import json
import math
import os
import random
import re
import shutil
import time
from pathlib import Path

import hominem_mlx  # noqa: F401  # isort: skip  # before mlx: on Linux it finds MLX a BLAS 30 times as fast
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.models import qwen3
from mlx_lm.utils import save_config, save_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hominem_mlx.data.split import split_of

HERE = Path(__file__).resolve().parent
STARTER = HERE.parent / "src" / "hominem_mlx" / "starter"

DIMENSIONS = [  # in the order in which their sentences stand in a grown reply
    "empathy",
    "social_coherence",
    "narrative_alignment",
    "epistemic_integrity",
    "harm_avoidance",
    "agency_support",
    "curiosity",
]
CATEGORIES = ["emotional", "conflict", "moral", "information", "agency", "narrative", "curiosity"]

SHAPE = dict(hidden_size=128, num_hidden_layers=4, intermediate_size=384, num_attention_heads=4, num_key_value_heads=2)
VOCABULARY = 3072
CORPUS_TIMES = 2  # how often an epoch holds each training reply
MASK = 0.2  # up to this share of a reply's own words is hidden behind others while it is learned
NOISE = 0.12  # share of a prompt's words that are lost, changed or added, in half of the conversations

TEMPLATE = (  # ChatML; `enable_thinking` and the like are accepted and change nothing
    "{%- for m in messages -%}{{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


# ---------------------------------------------------------------- the grammar


def read_grammar(path):
    """Rules by name, each a list of alternatives. The format is told at the top of the file; `also x` lines gather
    under the name also_x."""
    rules, name = {}, None
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") or not line.strip():
            continue
        if head := re.match(r"(also )?(\w+) = (.*)", line):
            name = ("also_" if head[1] else "") + head[2]
            rules[name] = rules[name] + " | " + head[3] if name in rules else head[3]
        else:
            rules[name] += " " + line.strip()
    return {name: [way.strip() for way in text.split("|")] for name, text in rules.items()}


class Grower:
    """Draws text from the rules. `kept` holds the capital draws of the conversation at hand."""

    def __init__(self, rules, seed):
        self.rules = rules
        self.random = random.Random(seed)
        self.kept = {}

    def grow(self, text):
        """Replace every {rule} in the text, and the rules within, by draws."""
        return re.sub(r"\{(\w+)(?:\.(\d))?\}", lambda m: self.draw(m[1], int(m[2] or 0)), text)

    def draw(self, name, field=0):
        if not name[0].isupper():
            return self.grow(self.random.choice(self.rules[name]))
        if name not in self.kept:
            self.keep(name, self.random.choice(self.rules[name]))
        return self.kept[name][field]

    def keep(self, name, way):
        self.kept[name] = [part.strip() for part in self.grow(way).split("~")]

    def sentence(self, name):
        """One sentence of a manner: by the rule; or one of the `also` sentences, whole; or the beginning of one with
        the end of another. Whole sentences teach English best, but a student that knew only them would recite."""
        dice, whole = self.random, self.rules["also_" + name]
        kind = dice.random()
        if kind < 0.35:
            return self.draw(name)
        if kind < 0.75:
            return self.grow(dice.choice(whole))
        parts = [re.split(r"(?<=[,;:]) ", text) for text in whole]
        parts = [part for part in parts if len(part) > 1]
        return self.grow(dice.choice(parts)[0] + " " + dice.choice(parts)[-1])


def tidy(text):
    """Spaces, a/an, and capitals at the start of sentences."""
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(r"\s+([,.;:?!])", r"\1", text)
    text = re.sub(r"([,;:])[,;:]+", r"\1", text)
    text = re.sub(r"[,;:]([.?!])", r"\1", text)
    text = re.sub(r"([.?!])\.", r"\1", text)
    text = re.sub(r"\b([Aa]) (?=[aeiouAEIO])", r"\1n ", text)
    return re.sub(r"(^|[.?!] )([a-z])", lambda m: m[1] + m[2].upper(), text)


# ---------------------------------------------------------------- conversations: lists of (role, text)


def manner_line(grower, levels, mean):
    """What a system message says of the reply to come: 'A good reply: kind, honest.' Levels: {dimension: +1 or -1}."""
    words = [grower.draw(f"manner_{d}_{'high' if v > 0 else 'low'}") for d, v in levels.items()]
    grower.random.shuffle(words)
    head = grower.draw("manner_" + quality(mean))
    return tidy(f"{head}: {', '.join(words)}." if words else f"{head}.")


def quality(mean):
    return "good" if mean >= 0.3 else "poor" if mean < -0.02 else "mixed"


def blur(dice, prompt, words, only_add=False):
    """Half of the prompts as they are; in the others a word here and there is lost, changed or added (`words` are
    what comes in), so that no prompt, however new, finds the student without an answer."""
    if dice.random() < 0.5:
        return prompt
    out = []
    for word in prompt.split():
        chance = dice.random() / NOISE
        if chance < 1 and (only_add or chance < 0.4):
            out += [dice.choice(words), word]
        elif chance < 0.7:
            out.append(dice.choice(words))
        elif chance >= 1:
            out.append(word)
    return " ".join(out)


def grown_reply(grower):
    """One to three sentences that keep their manners, about whatever situation is kept; and those manners."""
    dice = grower.random
    goodness = dice.choices([0.97, 0.5, 0.03], [0.42, 0.2, 0.38])[0]  # a good, a mixed, a poor reply
    spoken = set(dice.sample(DIMENSIONS, dice.choices([1, 2, 3], [0.12, 0.5, 0.38])[0]))
    levels = {d: 1 if dice.random() < goodness else -1 for d in DIMENSIONS if d in spoken}
    return tidy(" ".join(grower.sentence(f"{d}_{'high' if v > 0 else 'low'}") for d, v in levels.items())), levels


def with_manner(grower, talk, levels, mean, share):
    """The conversation, in some of the cases with a system message that names the manners."""
    if grower.random.random() < share:
        return [("system", manner_line(grower, levels, mean)), *talk]
    return talk


def grown_talk(grower, prompts, words):
    """A reply from the grammar: to a prompt of its own, or (a third) to one of the corpus's training prompts."""
    dice = grower.random
    grower.kept.clear()
    if dice.random() < 0.33:
        prompt = dice.choice(prompts)
        grower.keep("Sit", dice.choice(grower.rules["Anysit"]))
        people = {way.split("~")[0]: way for way in grower.rules["Who"]}
        named = [word for word in re.findall(r"[Mm]y ([a-z]+)", prompt) if word in people]
        grower.keep("Who", people[named[0]] if named else dice.choice(grower.rules["Anyone"]))
    else:
        grower.keep("Sit", dice.choice(grower.rules["sit_" + dice.choice(CATEGORIES)]))
        prompt = tidy(grower.draw("prompt"))
    if dice.random() < 0.15:
        prompt = prompt.lower()
    reply, levels = grown_reply(grower)
    talk = [("user", blur(dice, prompt, words)), ("assistant", reply)]
    return with_manner(grower, talk, levels, sum(levels.values()) / len(levels), 0.3)


def fact_talk(grower, words):
    """Facts told (or not), and asked for in some other wording. Half of the questions come without a telling:
    then only the form of the answer can be learned, and that is what supervised training builds upon."""
    draw, dice = grower.draw, grower.random
    grower.kept.clear()
    kind = draw("fact_kinds")
    question = draw(kind + "_ask")
    mark = "." if re.match(r"say |remind ", question) else "?"
    if mark == "?" and dice.random() < 0.2:
        question = draw("ask_head") + " " + question
    if mark == "?" and dice.random() < 0.15:
        question = question + " " + draw("ask_tail")
    question = tidy(question + mark)
    answer = tidy(draw(kind + "_answer") + draw("told_tail") + ".")
    ask = [("user", question), ("assistant", answer)]
    if dice.random() < 0.55:
        return [("user", blur(dice, question, words, only_add=True)), ask[1]]

    told = [tidy(f"{draw('fact_head')} {draw(kind + '_say')}.")]
    rel = grower.kept.get("Rel")
    for _ in range(dice.choice([0, 0, 1, 1, 2])):  # other facts around it, so that the right one must be found
        grower.kept.clear()
        other = draw("fact_kinds")
        if rel and dice.random() < 0.5:
            grower.kept["Rel"] = rel
        if other != kind:
            told.append(tidy(draw(other + "_say") + "."))
    dice.shuffle(told)
    if dice.random() < 0.3:
        return [("user", " ".join(told) + " " + question), ("assistant", answer)]
    if dice.random() < 0.5:
        told = [" ".join(told)]
    return [turn for t in told for turn in (("user", t), ("assistant", tidy(draw("fact_told"))))] + ask


def small_talk(grower):
    grower.kept.clear()
    return [("user", tidy(grower.draw("smalltalk_ask"))), ("assistant", tidy(grower.draw("smalltalk_answer")))]


def corpus_talks(grower, samples, times):
    """Each labelled reply, `times` times: plain, with its strong manners named, or with its rationale asked for."""
    for row in samples:
        reward = row["reward"]
        talk = [("user", row["prompt"]), ("assistant", row["response"])]
        strong = sorted(d for d in DIMENSIONS if abs(reward[d]) >= 0.4)
        for n in range(times):
            named = grower.random.sample(strong, min(len(strong), 3))
            levels = {d: math.copysign(1, reward[d]) for d in named}
            asked = [("user", tidy(grower.draw("judge_ask"))), ("assistant", row["rationale"])]
            yield with_manner(grower, talk + asked * (n % 4 == 3), levels, reward["scalar"], n % 2)


def write_conversations(corpus, seed, talks, facts):
    """All the student ever reads: grown talk, grown facts, small talk, and the training part of the corpus."""
    lines = (corpus / "reward_samples.jsonl").read_text(encoding="utf-8").splitlines()
    samples = [row for row in map(json.loads, lines) if split_of(row["prompt_id"]) == "train"]
    prompts = sorted({row["prompt"] for row in samples})
    words = " ".join(prompts).split()
    grower = Grower(read_grammar(HERE / "student_grammar.txt"), seed)
    conversations = [grown_talk(grower, prompts, words) for _ in range(talks)]
    conversations += [fact_talk(grower, words) for _ in range(facts)]
    conversations += [small_talk(grower) for _ in range(talks // 100)]
    conversations += corpus_talks(grower, samples, CORPUS_TIMES)
    grower.random.shuffle(conversations)
    return conversations, samples


# ---------------------------------------------------------------- tokenizer


def learn_tokenizer(texts, out):
    """Byte-level BPE, so that any text round-trips; saved with its chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(out)
    return tokenizer


def encode(tokenizer, talk):
    """Token ids of a conversation, as the chat template writes it, and which of them the student learns to say:
    the assistant's words with the end that closes them."""
    ids, said = [], []
    for role, text in talk:
        head = tokenizer.encode(f"<|im_start|>{role}\n")
        body = tokenizer.encode(text + "<|im_end|>")
        tail = tokenizer.encode("\n")
        ids += head + body + tail
        said += [False] * len(head) + [role == "assistant"] * len(body) + [False] * len(tail)
    return ids[:-1], said[:-1]  # nothing follows the last <|im_end|>


# ---------------------------------------------------------------- model and training


def new_model(tokenizer):
    config = dict(
        SHAPE,
        model_type="qwen3",
        architectures=["Qwen3ForCausalLM"],
        head_dim=32,
        rms_norm_eps=1e-6,
        vocab_size=len(tokenizer),
        hidden_act="silu",
        max_position_embeddings=2048,
        rope_theta=10000.0,
        tie_word_embeddings=False,  # an adapter on the output layer then leaves the input alone
        torch_dtype="float32",
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = qwen3.Model(qwen3.ModelArgs.from_dict(config))

    def initial(path, value):  # matrices at 1/sqrt(inputs), those that write to the residual stream at half of it
        if value.ndim == 1:
            return value
        scale = 0.02 if "lm_head" in path else 0.3 if "embed" in path else value.shape[1] ** -0.5
        return mx.random.normal(value.shape) * scale * (0.5 if "o_proj" in path or "down" in path else 1)

    model.update(tree_map_with_path(initial, model.parameters()))
    model.set_dtype(mx.float32)
    hold_constant_unit(model)
    mx.eval(model.parameters())
    return model, config


def hold_constant_unit(model):
    """Unit 0 of the residual stream is the same for every token, and no layer writes to it. Large models grow such
    units by themselves and use them as biases; here one is given, so that an adapter, which has no bias of its own,
    can learn the same shift everywhere: 'more of these words, less of those'."""
    model.model.embed_tokens.weight[:, 0] = 1.0
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = 0.0
        layer.mlp.down_proj.weight[0] = 0.0


def scale_constant_unit(model, examples):
    """Make the constant unit half of the final hidden state's square, and the output layer's weights for it smaller by
    as much: no probability changes, and an adapter on that layer finds its bias at once."""
    squares = [mx.square(model.model(mx.array([ids]))[0]).mean(0) for ids, _ in examples[:200]]
    mean = mx.stack(squares).mean(0)
    factor = mx.sqrt(mean[1:].sum() / mean[0])
    model.model.norm.weight[0] *= factor
    model.lm_head.weight[:, 0] /= factor


def batches(examples, tokens_per_batch, dice):
    """One epoch in random order: neighbours in length share a batch, padded to its longest.
    Yields inputs (batch, length), the places in them (n,), counted row after row, that are answered by a word of the
    assistant's, and those words (n,)."""
    order = sorted(range(len(examples)), key=lambda i: (len(examples[i][0]) + dice.random() * 4, i))
    chunks, chunk = [], []
    for i in order:
        if chunk and (len(chunk) + 1) * len(examples[i][0]) > tokens_per_batch:
            chunks.append(chunk)
            chunk = []
        chunk.append(i)
    chunks.append(chunk)
    dice.shuffle(chunks)
    pool = [i for ids, _ in examples[:2000] for i in ids]
    for chunk in chunks:
        longest = max(len(examples[i][0]) for i in chunk)
        tokens, places, words = [], [], []
        for row, i in enumerate(chunk):
            ids, said = examples[i]
            spots = [k for k in range(1, len(ids)) if said[k]]
            seen = list(ids)
            if len(spots) > 14 and dice.random() < 0.4:  # long replies only: facts must be read as they are
                rate = dice.random() * MASK
                seen = [dice.choice(pool) if said[k] and dice.random() < rate else i for k, i in enumerate(ids)]
            tokens.append(seen + [0] * (longest - len(ids)))
            places += [row * longest + k - 1 for k in spots]
            words += [ids[k] for k in spots]
        yield mx.array(tokens), mx.array(places), mx.array(words)


def loss_of(model, tokens, places, words):
    """Mean cross-entropy in nats of `words` (n,) at `places` (n,). The output layer, a quarter of the work, runs at
    those places alone."""
    hidden = model.model(tokens)
    hidden = hidden.reshape(-1, hidden.shape[-1])[places]
    return nn.losses.cross_entropy(model.lm_head(hidden), words, reduction="mean")


def train(model, examples, epochs, tokens_per_batch, peak, seed):
    """Muon for the matrices, AdamW for embeddings, output layer and norms; warm-up, then a cosine to 2 % of it."""
    dice = random.Random(seed)
    steps = sum(1 for _ in range(epochs) for _ in batches(examples, tokens_per_batch, random.Random(0)))

    def schedule(top):
        warm = optim.linear_schedule(top / 50, top, 50)
        return optim.join_schedules([warm, optim.cosine_decay(top, steps - 50, top / 50)], [50])

    optimizer = optim.MultiOptimizer(
        [
            optim.Muon(learning_rate=schedule(peak), momentum=0.95, weight_decay=0.0),
            optim.AdamW(learning_rate=schedule(peak / 4), betas=[0.9, 0.98], weight_decay=0.05),
        ],
        [lambda path, value: value.ndim == 2 and "embed" not in path and "lm_head" not in path],
    )
    step_of = nn.value_and_grad(model, loss_of)
    started, step, shown, count = time.time(), 0, 0.0, 0
    for _ in range(epochs):
        for batch in batches(examples, tokens_per_batch, dice):
            loss, gradient = step_of(model, *batch)
            gradient, _ = optim.clip_grad_norm(gradient, 1.0)
            optimizer.update(model, gradient)
            hold_constant_unit(model)
            mx.eval(loss, model.state, optimizer.state)
            shown, count, step = shown + loss.item(), count + 1, step + 1
            if step % 100 == 0 or step == steps:
                spent = time.time() - started
                left = spent / step * max(0, steps - step)
                print(f"step {step}/{steps}  loss {shown / count:.3f}  {spent:.0f} s, {left:.0f} s to go", flush=True)
                shown, count = 0.0, 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=STARTER / "student")
    parser.add_argument("--corpus", type=Path, default=STARTER, help="folder of reward_samples.jsonl")
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument("--talks", type=int, default=22000, help="grown conversations")
    parser.add_argument("--facts", type=int, default=14000, help="grown conversations about facts")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch", type=int, default=2048, help="tokens in a batch")
    parser.add_argument("--peak", type=float, default=0.02, help="highest learning rate of the matrices")
    args = parser.parse_args()

    mx.random.seed(args.seed)
    mx.set_default_device(mx.cpu)
    work = args.out.with_name(args.out.name + ".making")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)

    conversations, samples = write_conversations(args.corpus, args.seed, args.talks, args.facts)
    texts = [text for talk in conversations for _, text in talk]
    texts += [row[part] for row in samples for part in ("prompt", "response", "rationale")] * 10  # its words count more
    tokenizer = learn_tokenizer(texts, work)
    examples = [encode(tokenizer, talk) for talk in conversations]
    model, config = new_model(tokenizer)
    size = sum(value.size for _, value in tree_flatten(model.parameters()))
    print(f"{len(examples)} conversations, {sum(len(e[0]) for e in examples)} tokens, {size} parameters", flush=True)

    train(model, examples, args.epochs, args.batch, args.peak, args.seed)
    scale_constant_unit(model, examples)

    save_model(work, model)
    save_config(dict(config), work / "config.json")
    shutil.rmtree(args.out, ignore_errors=True)
    os.replace(work, args.out)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
