"""Configs load, errors say what is wrong and what would be right, nothing is ignored."""

import json
import typing
from pathlib import Path

import pytest

from nemomodel.config import precision
from nemomodel.config.checks import rank_problems
from nemomodel.config.help import documentation, help_text, undocumented
from nemomodel.config.load import ConfigError, config_to_dict, load_config, parse_config
from nemomodel.config.pattern import LayerKind, parse_pattern
from nemomodel.config.recipe import RecipeName
from nemomodel.config.schema import Config, PhaseConfig, SourceConfig

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = CONFIGS / "tiny.toml"
RECIPE_NAMES = typing.get_args(RecipeName)


def load(*overrides: str) -> Config:
    return load_config(TINY, overrides)


def problems(*overrides: str) -> list[str]:
    """The problems that tiny.toml has with `overrides`, one sentence each."""
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    head, *found = str(caught.value).split("\n  ")
    plural = "" if len(found) == 1 else "s"
    assert head == f"{TINY}: {len(found)} problem{plural}"
    return found


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_survives_a_round_trip(path: Path) -> None:
    config = load_config(path)
    plain = config_to_dict(config)
    assert parse_config(plain, where="again") == config
    assert parse_config(json.loads(json.dumps(plain)), where="again") == config


def test_all_shipped_configs_are_here() -> None:
    names = {path.stem for path in CONFIGS.glob("*.toml")}
    assert names >= {"tiny", "small", "nano_4b", "nano_30b", "super_120b", "ultra_550b"}


def test_shapes_of_the_published_configs() -> None:
    counts = {}
    for name in ("nano_30b", "nano_4b", "super_120b", "ultra_550b", "small"):
        layers = load_config(CONFIGS / f"{name}.toml").model.layers
        counts[name] = [layers.count(kind) for kind in LayerKind]
    # M, *, E, -
    assert counts == {
        "nano_30b": [23, 6, 23, 0],
        "nano_4b": [21, 4, 0, 17],
        "super_120b": [40, 8, 40, 0],
        "ultra_550b": [48, 12, 48, 0],
        "small": [12, 3, 12, 0],
    }


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("train.steps=1000", "train", "steps", 1000),
        ("optim.lr=1", "optim", "lr", 1.0),
        ("optim.lr=2e-4", "optim", "lr", 2e-4),
        ("precision.recipe=bf16", "precision", "recipe", "bf16"),
        ('precision.recipe="bf16"', "precision", "recipe", "bf16"),
        ("optim.grad_clip=none", "optim", "grad_clip", None),
        ('train.recompute=["moe", "mamba"]', "train", "recompute", ("moe", "mamba")),
        ("checkpoint.async_save=false", "checkpoint", "async_save", False),
        ("run.dir=runs/a=b", "run", "dir", "runs/a=b"),
        ("run.dir=2024-01-01", "run", "dir", "2024-01-01"),
    ],
)
def test_overrides_take_toml_values_and_bare_words(
    override: str, section: str, key: str, value: object
) -> None:
    found = getattr(getattr(load(override), section), key)
    assert found == value
    assert type(found) is type(value)


def test_overrides_apply_in_order_and_reach_nested_sections() -> None:
    config = load("train.steps=500", "train.steps=700", "model.mtp.num_depths=3")
    assert config.train.steps == 700
    assert config.model.mtp is not None
    assert config.model.mtp.num_depths == 3
    assert config.model.mtp.layer_pattern == "*E"


def test_none_unsets_a_section_and_a_key_in_file_and_override(tmp_path: Path) -> None:
    assert load("model.mtp=none").model.mtp is None
    assert load("model.mtp=none").model.num_mtp_blocks == 0
    assert load("model.mtp=none").model.mtp_layers == ()
    file = tmp_path / "none.toml"
    file.write_text(TINY.read_text().replace("interval = 100", 'interval = "none"'))
    config = load_config(file)
    assert config.checkpoint.interval is None
    assert config.train.validation_interval is None


def test_an_override_can_give_token_files() -> None:
    source = '[{path = "data/a"}, {path = "data/b", weight = 2}]'
    config = load(f"data.train={source}", "train.validation_interval=none")
    assert config.data.train == (
        SourceConfig(path="data/a"),
        SourceConfig(path="data/b", weight=2.0),
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", "override 'train.steps': expected section.key=value"),
        ("=3", "override '=3': expected section.key=value"),
        ("run.dir.x=3", "override 'run.dir.x=3': 'dir' is not a section"),
        (
            "train.steps=3\nx=4",
            "override 'train.steps=3\\nx=4': expected one key; give each its own argument",
        ),
    ],
)
def test_an_override_of_another_form_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(override)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        # unknown keys
        ("train.stepz=3", "train.stepz: unknown key; did you mean 'steps'?"),
        ("modl.hidden_size=3", "modl: unknown key; did you mean 'model'?"),
        ("model.mtp.depths=3", "model.mtp.depths: unknown key; did you mean 'num_depths'?"),
        (
            "checkpoint.zzz=1",
            "checkpoint.zzz: unknown key; known keys: interval, keep, async_save, init_from",
        ),
        # types and ranges
        ("train.steps=0", "train.steps=0: is not allowed; use a value above 0"),
        ("train.steps=3.0", "train.steps=3.0: is not allowed; use a whole number"),
        ("train.steps=3.5", "train.steps=3.5: is not allowed; use a whole number"),
        ("train.steps=true", "train.steps=true: is not allowed; use a whole number"),
        ('train.steps="3"', 'train.steps="3": is not allowed; use a whole number'),
        ("train.steps=none", "train.steps=none: is not allowed; use a whole number"),
        ("run.seed=-1", "run.seed=-1: is not allowed; use a value of at least 0"),
        ("run.deterministic=1", "run.deterministic=1: is not allowed; use true or false"),
        ("run.dir=", 'run.dir="": is not allowed; use a text that is not empty'),
        ("run.dir=none", "run.dir=none: is not allowed; use a text"),
        ("run.dir=5", "run.dir=5: is not allowed; use a text"),
        ("optim.lr=fast", 'optim.lr="fast": is not allowed; use a number'),
        ("optim.lr=0", "optim.lr=0: is not allowed; use a value above 0.0"),
        ("optim.lr=inf", "optim.lr=Infinity: is not allowed; use a finite number"),
        ("optim.min_lr=nan", "optim.min_lr=NaN: is not allowed; use a finite number"),
        ("optim.min_lr=-1", "optim.min_lr=-1: is not allowed; use a value of at least 0.0"),
        ("optim.beta2=1", "optim.beta2=1: is not allowed; use a value below 1.0"),
        (
            "precision.recipe=fp8",
            'precision.recipe="fp8": is not allowed; use '
            + " or ".join((", ".join(map(repr, RECIPE_NAMES[:-1])), repr(RECIPE_NAMES[-1]))),
        ),
        (
            "precision.executor=te",
            "precision.executor=\"te\": is not allowed; use 'emulated' or 'transformer_engine'",
        ),
        (
            "precision.executor=transformer_engine",
            "precision.executor='transformer_engine' has no effect with precision.recipe='fp32'; "
            "remove it, or use a recipe that quantises",
        ),
        ("train.recompute=moe", 'train.recompute="moe": is not allowed; use a list'),
        (
            'train.recompute=["mo"]',
            "train.recompute.0=\"mo\": is not allowed; use 'mamba', 'attention', 'moe' or 'mlp'",
        ),
        ("model.mamba=3", "model.mamba=3: is not allowed; use a section of keys"),
        ("run=none", "run=none: is not allowed; use a section of keys"),
        # model
        (
            "model.layer_pattern=ME/M",
            "model.layer_pattern='ME/M': unknown letter(s) /; use letters of M * E -",
        ),
        (
            'model.layer_pattern=""',
            "model.layer_pattern='': the pattern is empty; use letters of M * E -",
        ),
        (
            "model.mtp.layer_pattern=*X",
            "model.mtp.layer_pattern='*X': unknown letter(s) X; use letters of M * E -",
        ),
        (
            "model.mamba=none",
            "model.mamba is missing: the layer pattern has 'M'; give model.mamba",
        ),
        (
            "model.ffn_size=none",
            "model.ffn_size is missing: the layer pattern has '-'; give model.ffn_size",
        ),
        (
            "model.layer_pattern=ME*E",
            "model.ffn_size has no effect: no layer pattern has '-'; remove model.ffn_size",
        ),
        (
            "model.mamba.num_groups=3",
            "model.mamba.num_heads=8 is not divisible by model.mamba.num_groups=3; "
            "use model.mamba.num_groups in {1, 2, 4, 8}",
        ),
        (
            "model.attention.num_kv_heads=3",
            "model.attention.num_heads=4 is not divisible by model.attention.num_kv_heads=3; "
            "use model.attention.num_kv_heads in {1, 2, 4}",
        ),
        (
            "model.moe.top_k=9",
            "model.moe.top_k=9 is more than model.moe.num_experts=8; use at most 8",
        ),
        (
            "model.moe.latent_size=128",
            "model.moe.latent_size=128 is not below model.hidden_size=128; "
            "use a smaller one, or none for the plain MoE",
        ),
        (
            "model.moe.num_groups=3",
            "model.moe.num_experts=8 is not divisible by model.moe.num_groups=3; "
            "use model.moe.num_groups in {1, 2, 4, 8}",
        ),
        (
            "model.moe.top_groups=2",
            "model.moe.top_groups=2 is more than model.moe.num_groups=1; use at most 1",
        ),
        (
            "model.mtp.num_depths=256",
            "model.mtp.num_depths=256 is not below train.seq_length=256; "
            "no token that far ahead is in a sequence",
        ),
        # parallel
        (
            "parallel.ep=3",
            "parallel: ep=3 does not divide model.moe.num_experts=8; use ep in {1, 2, 4, 8}",
        ),
        (
            "parallel.etp=3",
            "parallel: etp=3 does not divide model.moe.ffn_size=128; "
            "use etp in {1, 2, 4, 8, 16, 32, 64, 128}",
        ),
        (
            "parallel.tp=4",
            "parallel: tp=4 does not divide model.mamba.num_groups=2; use tp in {1, 2}",
        ),
        (
            "parallel.cp=8",
            "parallel: tp*cp=8 does not divide model.attention.num_heads=4; use tp*cp in {1, 2, 4}",
        ),
        (
            "parallel.pp=10",
            "parallel.pp=10 is more than the 9 blocks of model.layer_pattern; use at most 9",
        ),
        (
            'model.layer_pattern="ME*|-ME"',
            "model.layer_pattern='ME*|-ME' has 2 pipeline stages, parallel.pp=1; "
            "use parallel.pp=2, or another number of |",
        ),
        (
            'model.layer_pattern="ME*-|ME|"',
            "model.layer_pattern='ME*-|ME|': a pipeline stage is empty; remove a |",
        ),
        (
            'model.mtp.layer_pattern="*|E"',
            "model.mtp.layer_pattern='*|E': MTP is on the last pipeline stage; remove the |",
        ),
        (
            "parallel.overlap_param_gather=true",
            "parallel.overlap_param_gather=true needs parallel.overlap_grad_reduce=true; "
            "set both or neither",
        ),
        # training
        (
            "train.micro_batch_size=3",
            "train.global_batch_size=8 is not divisible by train.micro_batch_size=3; "
            "use train.micro_batch_size in {1, 2, 4, 8}",
        ),
        (
            "train.stop_after=301",
            "train.stop_after=301 is more than train.steps=300; use at most 300",
        ),
        (
            "optim.min_lr=1",
            "optim.min_lr=1.0 is more than optim.lr=0.003; use a smaller one",
        ),
        (
            "schedule.kind=cosine",
            "schedule.decay_steps=100 has no effect with schedule.kind='cosine'; "
            "remove it, or use 'wsd'",
        ),
        (
            "schedule.decay_steps=none",
            "schedule.decay_steps is missing; with schedule.kind='wsd' use 1 to 300",
        ),
        (
            "schedule.warmup_steps=201",
            "schedule.warmup_steps=201 plus schedule.decay_steps=100 is more than "
            "train.steps=300; use 300 or less",
        ),
        # data
        (
            'data.validation=[{path = "data/v"}]',
            "data.validation is given without data.train; give both or neither",
        ),
        (
            "precision.bf16_last_layers=2",
            "precision.bf16_last_layers=2 has no effect with precision.recipe='fp32'; "
            "remove it, or use a recipe that quantises",
        ),
        (
            "data.tokenizer=a.json",
            "data.tokenizer='a.json' has no effect: the embedded corpus trains its own; "
            "give data.train, or remove it",
        ),
        (
            'data.train=[{path = "data/t"}]',
            "train.validation_interval=100 has no effect: data.validation is empty; "
            "give data.validation, or remove it",
        ),
    ],
)
def test_a_wrong_value_is_the_one_problem_named(override: str, problem: str) -> None:
    assert problems(override) == [problem]


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (
            ("precision.recipe=nvfp4", "precision.bf16_last_layers=9"),
            "precision.bf16_last_layers=9 leaves no layer of the 9 of model.layer_pattern to "
            "quantise; use at most 8, or precision.recipe='bf16'",
        ),
        (
            ("precision.recipe=nvfp4_12b",),
            "precision.recipe='nvfp4_12b' selects no linear layer of model.layer_pattern="
            "'MEM*-MEME'; use precision.bf16_last_layers=6, or precision.recipe='bf16'",
        ),
        (
            # Attention alone, which the recipe leaves in BF16.
            (
                "precision.recipe=nvfp4_super",
                "model.layer_pattern=**",
                "model.mamba=none",
                "model.ffn_size=none",
            ),
            "precision.recipe='nvfp4_super' selects no linear layer of model.layer_pattern='**'; "
            "use another recipe, or precision.recipe='bf16'",
        ),
    ],
)
def test_a_recipe_that_quantises_nothing_is_refused(
    overrides: tuple[str, ...], problem: str
) -> None:
    assert problems(*overrides) == [problem]


def phases(*tables: str) -> tuple[str, str]:
    return "precision.recipe=nvfp4", f"precision.phases=[{', '.join(tables)}]"


def test_phases_begin_with_the_step_whose_first_token_is_that_far() -> None:
    """A step of tiny.toml has 2,048 tokens."""
    tables = (
        '{from_tokens = 2048, recipe = "nvfp4_super"}',
        '{from_tokens = 4097, recipe = "nvfp4_super", bf16_last_layers = 3}',
        '{from_tokens = 612352, recipe = "bf16"}',
    )
    found = precision.phases(load(*phases(*tables)))
    assert [(p.name, p.first_step, p.last_layers) for p in found] == [
        ("nvfp4", 1, None),
        ("nvfp4_super", 2, None),
        ("nvfp4_super", 4, 3),
        ("bf16", 300, None),
    ]


def test_a_phase_has_the_last_layers_of_the_section_or_its_own() -> None:
    tables = (
        '{from_tokens = 2048, recipe = "mxfp8"}',
        '{from_tokens = 4096, recipe = "mxfp8", bf16_last_layers = 0}',
        '{from_tokens = 6144, recipe = "bf16"}',
    )
    for recipe, first in (("nvfp4", 2), ("bf16", 2)):
        overrides = (f"precision.recipe={recipe}", "precision.bf16_last_layers=2")
        found = precision.phases(load(*overrides, phases(*tables)[1]))
        assert [p.last_layers for p in found] == [first, 2, 0, None]


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (
            phases('{from_tokens = 0, recipe = "bf16"}'),
            "precision.phases.0.from_tokens=0: is not allowed; use a value above 0",
        ),
        (phases("{from_tokens = 9}"), "precision.phases.0.recipe: required, and not given"),
        (
            phases('{from_tokens = 9, recipe = "bf16", last = 2}'),
            "precision.phases.0.last: unknown key; known keys: from_tokens, recipe, "
            "bf16_last_layers",
        ),
        (
            phases('{from_tokens = 9, recipe = "fp32"}'),
            "precision.phases.0.recipe='fp32' cannot follow 'nvfp4': weights are FP32 with 'fp32' "
            "and BF16 with all others, in the whole run; use one kind",
        ),
        (
            phases('{from_tokens = 612353, recipe = "bf16"}'),
            "precision.phases.0.from_tokens=612353 is never reached: the last of train.steps=300 "
            "begins with token 612352; use at most that",
        ),
        (
            phases(
                '{from_tokens = 9000, recipe = "bf16"}', '{from_tokens = 5000, recipe = "mxfp8"}'
            ),
            "precision.phases.1.from_tokens=5000 is not after precision.phases.0.from_tokens=9000; "
            "list the phases in their order",
        ),
        (
            phases(
                '{from_tokens = 2049, recipe = "bf16"}', '{from_tokens = 4096, recipe = "mxfp8"}'
            ),
            "precision.phases.1.from_tokens=4096 leaves no step to precision.phases.0: both begin "
            "with step 3, of 2048 tokens; use at least 4097",
        ),
        (
            phases('{from_tokens = 9, recipe = "nvfp4"}'),
            "precision.phases.0 has no effect: every layer has the format that it has with "
            "precision.recipe='nvfp4'; remove it, or use another recipe",
        ),
        (
            phases('{from_tokens = 9, recipe = "nvfp4", bf16_last_layers = 0}'),
            "precision.phases.0 has no effect: every layer has the format that it has with "
            "precision.recipe='nvfp4'; remove it, or use another recipe",
        ),
        (
            (
                "precision.recipe=nvfp4_super_fp4_out_proj",
                "precision.bf16_last_layers=0",
                "model.layer_pattern=-E*-E*",
                "model.mamba=none",
            ),
            "precision.recipe='nvfp4_super_fp4_out_proj' is the same as 'nvfp4_super' with this "
            "model; use precision.recipe='nvfp4_super'",
        ),
        (
            ("precision.recipe=nvfp4_super_all_layers", "precision.bf16_last_layers=2"),
            "precision.recipe='nvfp4_super_all_layers' is the same as 'nvfp4_super' with this "
            "model; use precision.recipe='nvfp4_super'",
        ),
        (
            (
                *phases('{from_tokens = 100000, recipe = "bf16"}'),
                "observe.quantization_interval=50",
            ),
            "observe.quantization_interval=50 has no effect: nothing is quantised in those of "
            "train.steps=300 that it divides; use a smaller one",
        ),
        (
            phases('{from_tokens = 9, recipe = "bf16", bf16_last_layers = 2}'),
            "precision.phases.0.bf16_last_layers=2 has no effect with precision.phases.0.recipe="
            "'bf16'; remove it, or use a recipe that quantises",
        ),
        (
            phases('{from_tokens = 9, recipe = "mxfp8", bf16_last_layers = 10}'),
            "precision.phases.0.bf16_last_layers=10 leaves no layer of the 9 of "
            "model.layer_pattern to quantise; use at most 8, or precision.phases.0.recipe='bf16'",
        ),
        (
            (
                "precision.recipe=nvfp4",
                "precision.executor=transformer_engine",
                "run.device=cpu",
            ),
            "precision.executor='transformer_engine' needs a GPU, and run.device='cpu'; "
            "use precision.executor='emulated'",
        ),
    ],
)
def test_a_phase_or_executor_without_effect_is_refused(
    overrides: tuple[str, ...], problem: str
) -> None:
    assert problems(*overrides) == [problem]


def test_phases_are_tables_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "phases.toml"
    table = '[[precision.phases]]\nfrom_tokens = 600_000\nrecipe = "nvfp4_super_backward_only"\n'
    text = TINY.read_text().replace('recipe = "fp32"\n', f'recipe = "nvfp4_super"\n\n{table}')
    file.write_text(text)
    config = load_config(file)
    assert config.precision.phases == (
        PhaseConfig(from_tokens=600_000, recipe="nvfp4_super_backward_only"),
    )
    assert parse_config(config_to_dict(config), where="again") == config


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (
            ("model.layer_pattern=M-", "model.mtp=none", "model.attention=none"),
            "model.moe has no effect: no layer pattern has 'E'; remove model.moe",
        ),
        (
            ("model.moe.num_groups=4", "model.moe.top_k=3"),
            "model.moe.top_k=3 is more than the 2 experts of model.moe.top_groups=1 groups; "
            "use at most 2",
        ),
        (
            ("model.moe.num_groups=8", "model.moe.top_groups=2"),
            "model.moe.num_groups=8 leaves one expert per group, groups are ranked by their best "
            "two; use at most 4",
        ),
        (
            ("schedule.kind=constant", "schedule.decay_steps=none"),
            "optim.min_lr has no effect with schedule.kind='constant'; remove it",
        ),
        (
            ("model.layer_pattern=ME*E", "model.ffn_size=none", 'train.recompute=["mlp"]'),
            "train.recompute='mlp' has no effect: the model has no such layer; "
            "use some of attention, mamba, moe",
        ),
        (
            ('parallel.dispatcher="deepep"', "precision.recipe=bf16"),
            "parallel.dispatcher='deepep' has no effect: parallel.ep=1 and parallel.etp=1, "
            'no token travels; use "alltoall"',
        ),
        (
            ('parallel.dispatcher="hybridep"', "parallel.ep=2"),
            "parallel.dispatcher='hybridep' mixes BF16 tokens of several micro-batches, precision "
            'recipe fp32 has FP32; use "alltoall", or the recipe bf16',
        ),
        (
            (
                'parallel.dispatcher="deepep"',
                "parallel.ep=2",
                "precision.recipe=bf16",
                'precision.phases=[{from_tokens = 99, recipe = "mxfp8"}]',
            ),
            "parallel.dispatcher='deepep' mixes BF16 tokens of several micro-batches, precision "
            'recipe mxfp8 quantises every micro-batch apart; use "alltoall", or the recipe bf16',
        ),
        (
            (
                'parallel.dispatcher="deepep"',
                "parallel.etp=4",
                "precision.recipe=bf16",
                "model.moe.num_experts=16",
                "model.moe.top_k=9",
            ),
            "parallel.dispatcher='deepep' takes 32 experts per token, model.moe.top_k=9 times "
            'parallel.etp=4 is more; use "alltoall", or a smaller parallel.etp',
        ),
        (
            ('data.train=[{path = "t", weight = 0}]', "train.validation_interval=none"),
            "data.train.0.weight=0: is not allowed; use a value above 0.0",
        ),
    ],
)
def test_values_that_do_not_go_together_are_named(overrides: tuple[str, ...], problem: str) -> None:
    assert problems(*overrides) == [problem]


def test_several_problems_are_listed_together() -> None:
    found = problems("train.stepz=3", "modl.x=1", "run.seed=-1", 'data.train=[{pth = "a"}]')
    assert sorted(found) == [
        "data.train.0.path: required, and not given",
        "data.train.0.pth: unknown key; did you mean 'path'?",
        "modl: unknown key; did you mean 'model'?",
        "run.seed=-1: is not allowed; use a value of at least 0",
        "train.stepz: unknown key; did you mean 'steps'?",
    ]
    assert len(problems("parallel.ep=3", "train.stop_after=999", "model.moe.top_k=9")) == 3


def test_a_missing_key_and_a_missing_section_are_named() -> None:
    raw = config_to_dict(load())
    del raw["run"]["dir"], raw["train"]["steps"], raw["optim"], raw["model"]["mamba"]["num_heads"]
    with pytest.raises(ConfigError) as caught:
        parse_config(raw, where="checkpoint step_5")
    head, *found = str(caught.value).split("\n  ")
    assert head == "checkpoint step_5: 4 problems"
    assert sorted(found) == [
        "model.mamba.num_heads: required, and not given",
        "optim: required, and not given",
        "run.dir: required, and not given",
        "train.steps: required, and not given",
    ]


def test_a_syntax_error_names_the_file_and_the_line(tmp_path: Path) -> None:
    file = tmp_path / "broken.toml"
    file.write_text("[run]\ndir = \n")
    with pytest.raises(ConfigError, match=r"broken\.toml: .*at line 2"):
        load_config(file)


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    file = tmp_path / "binary.toml"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"binary\.toml: .*decode"):
        load_config(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "absent.toml"
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert str(caught.value) == f"{file}: No such file or directory"


def test_config_error_is_a_value_error() -> None:
    assert issubclass(ConfigError, ValueError)


def test_rank_problems() -> None:
    config = load("train.micro_batch_size=2")
    assert [list(rank_problems(config, ranks)) for ranks in (1, 2, 4)] == [[], [], []]
    assert list(rank_problems(config, 3)) == [
        "train.global_batch_size=8 is not divisible by train.micro_batch_size=2 times the 3 "
        "data-parallel rank(s) of WORLD_SIZE=3; use a multiple of 6"
    ]


def test_layouts_need_their_ranks() -> None:
    config = load("parallel.tp=2", "parallel.pp=2", "parallel.ep=4", "train.micro_batch_size=4")
    assert list(rank_problems(config, 8)) == []
    assert list(rank_problems(config, 6)) == [
        "parallel: tp*cp*pp=4 does not divide WORLD_SIZE=6; "
        "use a multiple of 8 ranks, or a smaller product",
        "parallel: etp*ep*pp=8 does not divide WORLD_SIZE=6; "
        "use a multiple of 8 ranks, or a smaller product",
    ]


def test_a_pattern_becomes_layer_kinds() -> None:
    assert parse_pattern("ME*-") == (
        LayerKind.MAMBA,
        LayerKind.MOE,
        LayerKind.ATTENTION,
        LayerKind.MLP,
    )


def test_help_names_every_key_with_its_documentation() -> None:
    text = help_text()
    assert undocumented() == []

    def visit(table: dict[str, object], prefix: str) -> None:
        for name, value in table.items():
            key = f"{prefix}{name}"
            if isinstance(value, dict):
                assert f"[{key}]" in text
                visit(value, f"{key}.")
            else:
                assert f"  {key}: " in text

    visit(config_to_dict(load()), "")
    assert "data.train[].weight: number above 0; default 1.0" in text
    assert "optim.grad_clip: number above 0, or none; default 1.0" in text
    assert "optim.beta1: number of at least 0 and below 1; default 0.9" in text
    assert 'run.device: auto | cpu | cuda; default "auto"' in text
    assert "key=none" in text
    assert documentation()["TrainConfig"]["steps"] in text
    assert max(map(len, text.splitlines())) <= 100
    assert text.isascii()


def test_quantised_weights_are_cut_between_blocks() -> None:
    bf16 = ("precision.recipe=nvfp4", "parallel.ep=2")
    assert problems(*bf16, "parallel.tp=2") == [
        "parallel.tp=2 cuts mamba.in_proj into pieces of 4, whose blocks have 16; "
        "use a recipe that does not quantise it"
    ]
    assert problems(*bf16, "parallel.etp=16") == [
        "parallel.etp=16 cuts moe.experts.fc1 into pieces of 8, whose blocks have 16; "
        "use etp in {1, 2, 4, 8}, or a recipe that does not quantise it",
        "parallel.etp=16 cuts moe.experts.fc2 into pieces of 8, whose blocks have 16; "
        "use etp in {1, 2, 4, 8}, or a recipe that does not quantise it",
    ]
    assert problems(*bf16[:1], "parallel.cp=2") == [
        "parallel: etp*ep=1 is not a multiple of tp*cp=2, which precision recipe nvfp4 needs: an "
        "expert would see parts of a micro-batch; use a multiple of 2"
    ]
