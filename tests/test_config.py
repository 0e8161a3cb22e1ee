"""Configuration: strict, layered, and helpful about typing errors."""

import pytest

from hominem_mlx.config import Config, RewardConfig, load_config
from hominem_mlx.errors import ConfigError


def test_the_default_never_leaves_the_machine():
    config = Config()
    assert config.teacher.kind == "recorded" and config.inference.endpoint is None and config.student.base == "starter"


def test_flag_wins_over_file_wins_over_home_wins_over_defaults(home, tmp_path):
    (home / "hominem.toml").write_text("[dual]\nrank = 2\nbeta = 0.2\nepochs = 3\n")
    (tmp_path / "run.toml").write_text("[dual]\nrank = 3\nbeta = 0.3\n")
    config = load_config(home, tmp_path / "run.toml", ["dual.rank=4"], {"dual": {"epochs": 9, "seed": 5}})
    assert (config.dual.rank, config.dual.beta, config.dual.epochs, config.dual.seed) == (4, 0.3, 3, 5)


@pytest.mark.parametrize(
    ("text", "nearest"),
    [("dual.rnk=4", "dual.rank"), ("dul.rank=4", "dual"), ("rank=4", "rank"), ("teacher.bas_url=x", "base_url")],
)
def test_an_unknown_key_names_the_nearest_known_one(text, nearest):
    with pytest.raises(ConfigError, match=rf"did you mean .*{nearest}"):
        load_config(overrides=[text])


def test_all_mistakes_are_told_at_once(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text("[dual]\nrank = 0\nbeta = 'x'\nranks = 3\n[teacher]\nkind = 'oracle'\n")
    with pytest.raises(ConfigError) as error:
        load_config(file=path, overrides=["dual.epochs=0", "nonsense"])
    text = str(error.value)
    for piece in (
        "dual.ranks",
        "dual.rank = 0",
        "dual.beta = 'x'",
        "teacher.kind = 'oracle'",
        "dual.epochs",
        "'nonsense'",
    ):
        assert piece in text
    assert text.count(str(path)) == 4


def test_a_mistake_in_a_file_is_named_with_line_key_value_and_the_nearest_key(tmp_path):
    path = tmp_path / "bad.toml"
    lines = [
        "# rank = 1",
        "seed = 3",
        "dual.rnk = 4",
        "dual.beta = -1.0",
        "[reward]",
        "layers = [",
        "  0.5,",
        "  7.0,",
        "]",
    ]
    lines += [
        "[student]",
        'system = """',
        "adaptor = 5",
        '"""',
        'adaptor = "none"',
        "[teacher]",
        'api_key = "sk-secret"',
    ]
    path.write_bytes("\r\n".join(lines).encode())
    with pytest.raises(ConfigError) as error:
        load_config(file=path)
    assert [problem.removeprefix(f"{path}:").split("; known")[0] for problem in error.value.problems] == [
        "2: unknown table or key seed = 3; did you mean evaluation.seed?",
        "3: unknown key dual.rnk = 4; did you mean dual.rank?",
        "4: dual.beta = -1.0: input should be greater than 0",
        "6: reward.layers.1 = 7.0: input should be less than or equal to 1",
        "14: unknown key student.adaptor = 'none'; did you mean student.adapter?",
        "16: unknown key teacher.api_key = '...'; did you mean teacher.api_key_env?",
    ]


@pytest.mark.parametrize("content", [b"[dual\nrank=1", b"\xff\xfe", b"dual = 3"])
def test_a_file_that_is_not_our_toml_is_named(tmp_path, content):
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"bad\.toml"):
        load_config(file=path)


@pytest.mark.parametrize("value", ["nan", "inf", "-1.0", "0.0"])
def test_numbers_that_cannot_be_right_are_refused(value):
    with pytest.raises(ConfigError, match=r"dual\.learning_rate"):
        load_config(overrides=[f"dual.learning_rate={value}"])


def test_a_bare_word_is_a_string_and_every_field_has_a_docstring():
    assert load_config(overrides=["teacher.kind=local"]).teacher.kind == "local"
    for name, table in Config.model_fields.items():
        for key, field in table.annotation.model_fields.items():
            assert field.description, f"{name}.{key} does not say what it means"


def test_what_is_left_to_the_backbone_is_filled_in_and_what_is_given_stays():
    given = RewardConfig.model_validate({"layers": (0.5,), "words": 0.0})
    encoder, student = given.reading("encoder"), RewardConfig().reading("lm")
    assert (encoder.layers, encoder.words, encoder.poolings) == ((0.5,), 0.0, ("mean", "std", "gap", "near"))
    assert (student.layers, student.words, student.poolings) == ((0.0, 0.33, 0.67), 0.0, ("mean", "max", "std", "gap"))
    assert given.reading("ngram") == given


def test_what_a_reward_head_cannot_do_is_refused_and_words_stand_beside_a_ridge_only():
    for settings, said in [
        ({"head": "attention", "backbone": "ngram"}, "use head = ridge"),
        ({"head": "attention", "words": 0.5}, "words is for head = ridge"),
        ({"head": "attention", "choose_layers": True}, "choose_layers is for head = ridge"),
        ({"lora_rank": 2}, "lora_rank needs head = attention"),
    ]:
        with pytest.raises(ValueError, match=said):
            RewardConfig(**settings)
    assert RewardConfig().reading("encoder").words == 0.5 and RewardConfig().reading("lm").words == 0
    assert RewardConfig(head="attention").reading("encoder").words == 0


def test_settings_that_need_one_another_may_come_from_several_places(home, tmp_path):
    (home / "hominem.toml").write_text('[reward]\nhead = "attention"\nbackbone = "lm"\n')
    assert load_config(home, overrides=["reward.lora_rank=4"]).reward.lora_rank == 4
    for order in (("reward.head=attention", "reward.lora_rank=4"), ("reward.lora_rank=4", "reward.head=attention")):
        assert load_config(overrides=order).reward.head == "attention"
    gated = load_config(overrides=["reward.scalar=gated", 'reward.poolings=["mean", "prompt"]'])
    assert gated.reward.scalar == "gated"

    with pytest.raises(ConfigError) as refused:  # neither is wrong by itself
        load_config(home, overrides=["reward.words=0.5"])
    assert len(refused.value.problems) == 1 and "words is for head = ridge" in str(refused.value)
    file = tmp_path / "run.toml"
    file.write_text("[dual]\nrank = 4\n[reward]\nlora_rank = 4\n")
    with pytest.raises(ConfigError) as refused:  # and what one place has wrong is told with that place
        load_config(file=file)
    assert len(refused.value.problems) == 1 and str(refused.value).startswith(f"{file}:3: reward = ")


def test_an_unknown_key_of_a_dimension_of_ones_own_names_those_that_there_are():
    with pytest.raises(ConfigError, match=r"unknown key manifold\.dimension\.0\.xyzzy = 3; known: name, .*rubric"):
        load_config(overrides=['manifold.dimension=[{name="humour", xyzzy=3}]'])


def test_a_version_may_be_given_by_its_number_alone():
    config = load_config(overrides=["student.reward_model=3", "student.adapter=12"])
    assert (config.student.reward_model, config.student.adapter) == ("3", "12")
    with pytest.raises(ConfigError, match=r"adapter"):  # a number in TOML, and not the name that was typed
        load_config(overrides=["student.adapter=1234e567"])


def test_what_does_not_go_together_is_told_beside_all_else():
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=["reward.lora_rank=4", "reward.backbon=lm"])
    assert len(caught.value.problems) == 2
    assert "lora_rank" in caught.value.problems[1] and "backbon" in caught.value.problems[0]
    with pytest.raises(ConfigError, match="UTF-8"):
        load_config(overrides=["student.system=\udcff"])
