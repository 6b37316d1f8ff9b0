"""Defaults that all experiments start from, every key with its meaning."""

from collections.abc import Sequence

from ml_collections import ConfigDict, FieldReference


def model() -> ConfigDict:
    """A model section: see kd_jax/models/blueprint.py."""
    return ConfigDict(dict(model="", revision="main", architecture=ConfigDict()))


def base(recipe: str) -> ConfigDict:
    """The keys of every training recipe."""
    c = ConfigDict()
    c.recipe = recipe  # kd_jax/recipes/<recipe>.py
    c.seed = 0  # of initialisation, order of the data, masks and dropout
    c.precision = "bf16"  # fp32 | bf16: types of matrix products; parameters are float32
    c.batch_size = 256  # global rows a step, a multiple of devices x accumulate
    c.accumulate = 1  # micro-batches a step, exact
    c.remat = False  # compute blocks again in the backward pass: less memory, more time
    c.vocab_chunk = 0  # rows of logits that exist at a time; 0: as many as fill 128 MB
    c.mesh = ConfigDict(dict(fsdp=1))  # devices that share one copy of the parameters
    c.steps = 100_000  # optimizer steps a stage
    # stage -> what differs there: steps, batch_size, optim, and the keys of STAGE below
    c.stages = ConfigDict()
    c.teacher = model()
    # scratch: random parameters, where there is neither a checkpoint nor a stage that trains it
    c.teacher.init = ""
    c.student = model()
    c.student.init = "teacher"  # teacher | model | scratch
    # uniform | first | last | a list of layers from 0, for init = teacher
    c.student.layers = FieldReference("uniform", field_type=object)
    # A folder or hub id, or what to train on the text: wordpiece | bpe; else the teacher's own.
    c.tokenizer = ConfigDict(dict(path="", train="", vocab_size=30_522))
    c.objective = ConfigDict()  # of the student: term -> settings
    c.optim = ConfigDict(
        dict(
            learning_rate=5e-4,  # the peak
            schedule=dict(kind="linear", warmup=0.05),  # kd_jax/schedules.py
            weight_decay=0.01,
            beta1=0.9,
            beta2=0.999,
            epsilon=1e-8,
            clip_norm=1.0,  # global norm of the gradient; 0: no clipping
            learning_rate_multipliers=((".*", 1.0),),  # (regex, factor), first match; 0 freezes
        )
    )
    c.task = ConfigDict()  # kd_jax/tasks/<name>.py
    c.data = ConfigDict()  # kd_jax/tasks/task.py
    c.eval = ConfigDict(dict(every=1000, batch_size=64))  # steps; global rows
    c.checkpoint = ConfigDict(dict(every=1000, keep=2))  # steps; the last N, besides the best
    c.log = ConfigDict(dict(every=50))  # steps between rows of timing.csv
    c.resume = ""  # RUN/STAGE whose last checkpoint the student goes on from
    c.wandb = ""  # project name: also log to Weights & Biases
    return c


def teacher(name: str) -> ConfigDict:
    """A section of `teachers`, and the one of `teacher` in fine-tuning."""
    c = model()
    c.init = ""  # as that of `teacher`
    c.model = name
    c.weight = 1.0  # its share among several teachers
    c.labels = ()  # its class names, in its own order, where it is taken as it is without names
    return c


def with_embeddings(student: int, teacher: int) -> tuple[tuple[int, int], ...]:
    """TinyBERT's map: embeddings to embeddings, layer i to layer i x teacher / student."""
    return tuple((i, i * teacher // student) for i in range(student + 1))


def sweep(*keys: tuple) -> ConfigDict:
    """Trials over `keys`, pairs of a dotted key and its values; see kd_jax/recipes/sweep.py."""
    return ConfigDict(dict(stage="student", keys=keys, sampler="grid", trials=20))


def finetuning() -> ConfigDict:
    """The keys of fine-tuning: those of `base`, with what differs."""
    c = base("finetune")
    del c.vocab_chunk
    c.batch_size = 32
    c.epochs = 3.0  # passes over the training examples, a stage
    c.steps = 0  # above 0: so many steps instead
    c.patience = 0  # evaluations without a better one that end a stage; 0: none do
    c.teacher = teacher("")
    c.teachers = ConfigDict()  # further teachers: name -> a section like `teacher`
    c.intermediate = ConfigDict()  # objective of the stage "intermediate", before the student's
    c.average = "logits"  # logits | probabilities: what several teachers are averaged in
    c.assistant = model()  # between teacher and student, where stages has "assistant"
    c.assistant.init = "teacher"
    c.assistant.layers = FieldReference("uniform", field_type=object)
    c.theseus = _theseus(2)
    c.optim.learning_rate = 2e-5
    c.optim.schedule = dict(kind="linear", warmup=0.1)
    c.eval = ConfigDict(dict(every=0, batch_size=64))  # steps, 0: once an epoch; global rows
    c.checkpoint = ConfigDict(dict(keep=1))  # one at each evaluation; the last N, besides the best
    # Teachers' logits are computed once for each row and kept: at most so many GB of all teachers
    # (0: teachers answer at every step), in a folder ("": $KD_JAX_CACHE), under teacher_logits/.
    c.cache = ConfigDict(dict(max_gb=10.0, folder=""))
    c.cost = ConfigDict(dict(repeats=100))  # timed calls a model, for latency and throughput
    return c


def pruning(recipe: str = "prune") -> ConfigDict:
    """The keys of pruning: those of `base`, and a section, see kd_jax/stages/prune.py."""
    c = base(recipe)
    c.pruning = ConfigDict(
        dict(
            target=0.3,  # share of all parameters that goes
            ranking="global",  # global | layer: what heads and FFN columns compete with
            distil=True,  # fine-tuned on the objective, beside the original; else on the labels
        )
    )
    return c


def _theseus(group: int) -> ConfigDict:
    """A section `theseus`, see kd_jax/stages/theseus.py."""
    return ConfigDict(
        dict(
            group=group,  # blocks of the teacher to one of the successor
            layers=FieldReference("first", field_type=object),  # that successors begin as
            rate=FieldReference(0.5, field_type=object),  # a number or a schedule
            steps=0.5,  # of replacement, or a share of the stage below 1
        )
    )


def substitution() -> ConfigDict:
    """The keys of substitution: those of `pruning`, which here makes a model as small as
    substitution does, and a section, see kd_jax/stages/swaps.py."""
    c = pruning("substitute")
    c.pruning.target = 0.0
    c.substitution = ConfigDict(
        dict(
            kind="bottleneck",  # bottleneck | slim
            width=1,  # inside a bottleneck; 0 for slim blocks
            num_heads=1,  # of a compact block
            num_kv_heads=1,
            ffn_width=1,
            init="random",  # random | pruned: how a compact block begins
            fit_steps=0,  # steps of regression to the blocks that go, before each swap
            fit_learning_rate=1e-3,
            order=FieldReference("last_first", field_type=object),  # kd_jax/stages/swaps.py
            importance_batches=16,  # training batches that order="importance" looks at
            blocks=1,  # to replace at each swap
            steps=1000,  # from one swap to the next
            target=0.3,  # share of all parameters that goes
            learning_rate=5e-4,  # of compact blocks, the peak; optim.learning_rate is the others'
            warmup=50,  # updates in which a new block's learning rate is reached
        )
    )
    c.theseus = _theseus(0)  # 0: the blocks that substitution replaces, each to its compact one
    return c


def ensemble() -> ConfigDict:
    """The keys of sequential ensembles, see kd_jax/stages/round.py."""
    c = base("ensemble")
    c.rounds = 6  # of config.steps steps; each adds a member
    c.stages = dict(round={})
    c.ensemble = ConfigDict(
        dict(
            space="logits",  # logits | probabilities: what members are averaged in
            start="student",  # student | previous: what a round's student begins as
            rows=0,  # of training text, the same in every round; 0: all
            fresh=False,  # new text in every round, teacher and members in the step
            top_k=64,  # logits of a token that are kept where there is no room for all
            weights="equal",  # equal | learned: of the members, in the end
            past_run_dirs=(),  # finished runs whose members come first
            eval_mean="token",  # token | batch: what a held-out mean is over
        )
    )
    c.cache = ConfigDict(dict(max_gb=20.0, folder=""))  # of logits on disk; "": $KD_JAX_CACHE
    c.student.init = "model"
    return c


def split(arg: str | None, have: Sequence[str], default: str) -> tuple[str, bool]:
    """(variant, smoke) of an argument like "mrpc", "mrpc-smoke" or "smoke"."""
    name, _, ending = (arg or default).partition("-")
    if name == "smoke" and not ending:
        return default, True
    if name not in have or ending not in ("", "smoke"):
        raise ValueError(f"unknown variant {arg!r}; have: {', '.join(have)}; each with -smoke")
    return name, ending == "smoke"


def wikitext103() -> dict:
    """config.data: the three splits of WikiText-103 (Merity et al. 2016, arXiv:1609.07843)."""
    splits = ("train", "validation", "test")
    name = dict(path="Salesforce/wikitext", name="wikitext-103-raw-v1")
    return {split: dict(source="hub", **name) for split in splits}


# What a stage is where neither config.stages.NAME nor its name, below, says otherwise.
STAGE = dict(
    kind="plain",  # kd_jax/stages/<kind>.py
    model="student",  # the section of the config that it trains
    objective="objective",  # the key of its terms, learned from the teachers; "": labels alone
    after="",  # the stage whose last parameters it goes on from, where there is such a stage
    select=True,  # keeps the checkpoint that is best by held-out figures; else the last one
)
# Stages that are known by their names, in the order in which a run goes through them; others come
# after them, and say their kind. Further teachers (`teachers`) are stages like `teacher`.
STAGES = dict(
    teacher=dict(model="teacher", objective=""),
    assistant=dict(model="assistant"),
    baseline=dict(objective=""),
    intermediate=dict(objective="intermediate", select=False),
    substitute=dict(kind="substitute", model=""),  # "": a model that the stage makes
    prune=dict(kind="prune", model=""),
    theseus=dict(kind="theseus", model=""),
    student=dict(after="intermediate"),
    round=dict(kind="round"),
)
