"""`:smoke` of an experiment: the same program on tiny generated models and data, in seconds."""

from ml_collections import ConfigDict

from kd_jax import plugins, samples

_BERT = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=32,
)
_BOTTLENECKS = dict(embedding_size=16, intra_bottleneck_size=16, num_feedforward_networks=2)
TINY = {
    "bert": dict(model_type="bert") | _BERT,
    "roberta": dict(model_type="roberta") | _BERT,
    "mobilebert": dict(model_type="mobilebert") | _BERT | _BOTTLENECKS,
    # What differs from the teacher, a BERT; its feed-forward width has a name of its own.
    "distilbert": dict(model_type="distilbert", num_hidden_layers=1, hidden_dim=64),
    "gpt2": dict(model_type="gpt2", n_embd=32, n_layer=2, n_head=2, n_positions=32),
    "llama": dict(model_type="llama", num_key_value_heads=1, tie_word_embeddings=True) | _BERT,
    "qwen2": dict(model_type="qwen2", num_key_value_heads=1, tie_word_embeddings=True) | _BERT,
    "phi": dict(model_type="phi", resid_pdrop=0.1) | _BERT,
}


def smoke_finetuning(c: ConfigDict) -> ConfigDict:
    """The same program on tiny models and made-up data (kd_jax/samples.py), in seconds."""

    def tiny(section: ConfigDict, own: bool) -> None:
        kind = section.architecture.get("model_type") or next(
            (name for name in ("distilbert", "mobilebert", "roberta") if name in section.model),
            "bert",
        )
        if own and kind == "bert" and not section.model:  # the teacher with fewer layers
            section.architecture = ConfigDict(dict(num_hidden_layers=1))
        elif own and kind == "distilbert":
            section.architecture = ConfigDict(TINY[kind])
        else:
            section.architecture = ConfigDict(TINY[kind] | dict(max_position_embeddings=66))
        if section.init in ("", "model"):
            section.init = "scratch"
        section.model = ""

    for section in (c.teacher, *(c.teachers[name] for name in c.teachers)):
        tiny(section, own=False)
    tiny(c.assistant, own=True)
    tiny(c.student, own=True)
    task = plugins.load("tasks", c.task.name, "make").make
    changes, data = task.smoke(c.task, c.data, samples.folder())
    c.task.update(changes)
    c.data = ConfigDict(data | dict(held_out=0.2))
    c.tokenizer = ConfigDict(dict(path="", train="wordpiece", vocab_size=256))
    c.batch_size, c.accumulate, c.epochs, c.steps = 16, 1, 1.0, 4
    c.optim.learning_rate = 1e-2  # something to see after four steps
    c.stages = ConfigDict({name: {} for name in c.stages})
    c.eval = ConfigDict(dict(every=2, batch_size=64))
    c.cost.repeats = 5
    c.log.every = 1
    return c


def or_smoke(c: ConfigDict, arg: str | None, family: str = "bert") -> ConfigDict:
    """The config itself, or with `:smoke` the same program on generated models and text, tiny.

    `family` is the teacher's; the student's too, unless its architecture names another.
    """
    if arg not in (None, "", "smoke"):
        raise ValueError(f"unknown variant {arg!r}; have: smoke")
    if not arg:
        return c
    if "substitution" in c:  # both blocks of the teacher, one after the other
        c.substitution.update(num_heads=1, num_kv_heads=1, ffn_width=24, steps=2, warmup=1)
        c.substitution.update(width=16 if c.substitution.kind == "bottleneck" else 0)
        c.substitution.update(importance_batches=1, fit_steps=min(c.substitution.fit_steps, 2))
        c.substitution.target = 0.3 if family == "gpt2" else 0.2
        c.theseus.group = 2
        c.student.architecture = ConfigDict()
    if "ensemble" in c:
        c.rounds, c.student.init, c.ensemble.rows = 2, "scratch", 64
        c.mesh.fsdp, c.cache.max_gb = 1, 0.1
    student = c.student.architecture.get("model_type")
    c.teacher.model, c.teacher.architecture = "", ConfigDict(TINY[family])
    c.teacher.init = "scratch"
    c.student.model = ""
    if c.student.init == "model":
        c.student.init = "teacher"
    if not {"substitution", "pruning"} & {*c}:
        c.student.architecture = ConfigDict(TINY[student] if student else dict(num_hidden_layers=1))
    if not isinstance(c.student.layers, str):
        c.student.layers = "uniform"
    task = plugins.load("tasks", c.task.name, "make").make
    changes, data = task.smoke(c.task, c.data, samples.folder())
    c.task.update(changes)
    c.data = ConfigDict(data)
    if task.of_chats:
        tokenizer = samples.folder() / "chats" / "tokenizer"
        c.tokenizer = ConfigDict(dict(path=str(tokenizer), train="", vocab_size=512))
        c.teacher.architecture.update(vocab_size=512, max_position_embeddings=128)
    else:
        kind = "bpe" if task.head == "clm" else "wordpiece"
        c.tokenizer = ConfigDict(dict(path="", train=kind, vocab_size=512))
    c.batch_size, c.accumulate, c.steps = 16, 1, 4
    c.stages = ConfigDict({name: {} for name in c.stages})
    c.eval = ConfigDict(dict(every=2, batch_size=64))
    c.checkpoint = ConfigDict(dict(every=2, keep=2))
    c.log.every = 1
    return c
