from __future__ import annotations

import dataclasses

import pytest
import yaml

from hellm.config import (
    PRESETS,
    LLMConfig,
    ModelConfig,
    PretrainConfig,
    TransitionsConfig,
    config_from_dict,
    config_to_dict,
    load_config,
    override_config,
    save_config,
)

# run: (user-item, user, item layers), user weight, item weight, k, temperature, l2 weight; from the published logs
PUBLISHED = {
    "hellm-beauty": ((2, 2, 1), 0.9, 0.1, 10, 0.5, 1e-4),
    "hellm-sports": ((2, 2, 2), 0.7, 0.1, 5, 0.5, 1e-3),
    "hellm-toys": ((2, 3, 2), 0.03, 0.07, 10, 0.3, 1e-3),
    "mmhcl-tiktok": ((2, 3, 2), 0.03, 0.07, 5, 0.6, 1e-3),
    "mmhcl-clothing": ((2, 2, 2), 0.1, 0.7, 10, 0.4, 1e-3),
    "mmhcl-sports": ((2, 2, 2), 0.3, 0.7, 5, 0.5, 1e-5),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_has_the_published_numbers(name):
    layers, user, item, k, temperature, l2 = PUBLISHED[name]
    config = load_config(PretrainConfig, name)
    model = config.model
    assert (model.num_layers, model.num_user_layers, model.num_item_layers) == layers
    assert (config.user_contrastive_weight, config.item_contrastive_weight) == (user, item)
    assert (model.knn_k, config.temperature, config.l2_weight) == (k, temperature, l2)
    assert (model.embedding_dim, model.backbone, config.batch_size) == (64, "lightgcn", 1024)
    assert (config.learning_rate, config.learning_rate_decay, config.learning_rate_decay_epochs) == (1e-4, 0.96, 50)
    assert (config.validate_every, config.patience, config.max_epochs, config.seed) == (5, 5, 1000, 2024)
    assert (config.protocol, config.sampler) == ("official", "user-uniform")


def test_compatibility_is_asked_for_and_never_a_preset():
    assert set(PRESETS[PretrainConfig]) == {"default", "demo", "softmax", *PUBLISHED}
    assert all(preset.compat is None for preset in PRESETS[PretrainConfig].values())


@pytest.mark.parametrize("name", PRESETS[PretrainConfig])
def test_saved_config_loads_equal(name, tmp_path):
    config = load_config(PretrainConfig, name)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(PretrainConfig, tmp_path / "config.yaml") == config
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_file_sets_only_what_it_names(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("learning_rate: 1e-3\nmodel: {num_layers: 3, modalities: [image]}\nks: [5, 20]\n")
    config = load_config(PretrainConfig, path, ["temperature=0.2"])
    expected = PretrainConfig(
        model=ModelConfig(num_layers=3, modalities=("image",)), learning_rate=1e-3, ks=(5, 20), temperature=0.2
    )
    assert config == expected


def test_empty_file_is_the_default(tmp_path):
    (tmp_path / "empty.yaml").write_text("")
    assert load_config(PretrainConfig, tmp_path / "empty.yaml") == PretrainConfig()


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("model.num_layers=3", lambda c: c.model.num_layers, 3),
        ("learning_rate=1e-3", lambda c: c.learning_rate, 1e-3),
        ("temperature=1", lambda c: c.temperature, 1.0),
        ("contrastive_rows=512", lambda c: c.contrastive_rows, 512),
        ("contrastive_rows=null", lambda c: c.contrastive_rows, None),
        ("precision=medium", lambda c: c.precision, "medium"),
        ("model.user_hypergraph=false", lambda c: c.model.user_hypergraph, False),
        ("model.modalities=[image, text]", lambda c: c.model.modalities, ("image", "text")),
        ("model.modalities=image", lambda c: c.model.modalities, ("image",)),
        ("monitor=recall@10", lambda c: c.monitor, ("recall@10",)),
    ],
)
def test_override_sets_one_value(override, read, value):
    changed = read(override_config(PretrainConfig(), [override]))
    assert changed == value and type(changed) is type(value)


def test_later_override_wins_and_the_original_stays():
    config = PretrainConfig()
    assert override_config(config, ["seed=1", "seed=2"]).seed == 2
    assert config.seed == 2024


def test_settings_that_go_together_may_come_in_any_order():
    overrides = ["sampled_items=8", "loss=softmax", "contrastive_keys=4", "contrastive_rows=2", "model.num_layers=1"]
    for order in (overrides, overrides[::-1]):
        config = override_config(PretrainConfig(), order)
        assert (config.sampled_items, config.contrastive_keys, config.model.num_layers) == (8, 4, 1)
    with pytest.raises(ValueError, match="sampled_items must be null with loss bpr, got 8"):
        override_config(PretrainConfig(), ["sampled_items=8"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learning_rat=1", r"unknown setting 'learning_rat'; did you mean 'learning_rate'\?"),
        ("model.num_layer=1", r"unknown setting 'model.num_layer'; did you mean 'model.num_layers'\?"),
        ("seed.x=1", r"setting seed has no parts, got 'seed.x'"),
        ("seed", r'an override must look like "key=value", got \'seed\''),
        ("=3", r'an override must look like "key=value"'),
        ("seed=1.5", r"seed must be an integer, got 1.5"),
        ("seed=true", r"seed must be an integer, got True"),
        ("temperature=hot", r"temperature must be a number, got 'hot'"),
        ("temperature=true", r"temperature must be a number, got True"),
        ("tensorboard=1", r"tensorboard must be true or false, got 1"),
        ("device=3", r"device must be text, got 3"),
        ("sampler=all", r"sampler must be one of 'user-uniform', 'interaction-uniform', got 'all'"),
        ("model=3", r"model must be a mapping of settings, got 3"),
        ("temperature=-0.1", r"temperature must be > 0, got -0.1"),
        ("learning_rate=.nan", r"learning_rate must be > 0, got nan"),
        ("l2_weight=-1", r"l2_weight must be >= 0, got -1.0"),
        ("batch_size=0", r"batch_size must be >= 1, got 0"),
        ("contrastive_rows=0", r"contrastive_rows must be null or >= 1, got 0"),
        ("patience=-1", r"patience must be >= 0, got -1"),
        ("ks=[]", r"ks must be list lengths >= 1, got \(\)"),
        ("monitor=[]", r"monitor must be at least one metric, got \(\)"),
        ("monitor=[recall]", r"monitor must be metric@k with k >= 1, got 'recall'"),
        ("model.knn_k=0", r"model.knn_k must be >= 1, got 0"),
        ("model.dropout=1", r"model.dropout must be in \[0, 1\), got 1.0"),
        ("model.modalities=[]", r"model.modalities must be null or not empty, got \(\)"),
    ],
)
def test_wrong_override_says_what_was_expected(override, message):
    with pytest.raises(ValueError, match=message):
        override_config(PretrainConfig(), [override])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sampled_neighbours=0"], r"sampled_neighbours must be null or >= 1, got 0"),
        (["compat=official"], r"sampled_neighbours must be null with compat, got 8"),
        (
            ["model.backbone=ngcf"],
            r"sampled_neighbours must be null with backbone ngcf, which is not linear in what it reads, got 8",
        ),
        (
            ["contrastive_keys=null"],
            r"contrastive_keys must be set with sampled_neighbours, as all nodes as keys read the whole graphs, got",
        ),
        (["contrastive_keys=null", "user_contrastive_weight=0"], r"contrastive_keys must be set with"),
        (["contrastive_keys=null", "model.user_hypergraph=false"], r"contrastive_keys must be set with"),
    ],
)
def test_what_sampled_neighbours_exclude(overrides, message):
    keys = ["contrastive_rows=64", "contrastive_keys=64", "sampled_neighbours=8"]
    assert override_config(PretrainConfig(), keys).sampled_neighbours == 8
    with pytest.raises(ValueError, match=message):
        override_config(PretrainConfig(), [*keys, *overrides])


def test_sampled_neighbours_need_keys_only_where_there_is_a_contrast():
    weights = ["user_contrastive_weight=0", "item_contrastive_weight=0"]
    graphs = ["model.user_hypergraph=false", "model.item_hypergraph=false"]
    for without in (weights, graphs, [weights[0], graphs[1]]):
        assert override_config(PretrainConfig(), ["sampled_neighbours=8", *without]).contrastive_keys is None


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match=r"unknown preset or config file 'hellm-beuty'; did you mean 'hellm-beauty'\?"):
        load_config(PretrainConfig, "hellm-beuty")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config file .*absent.yaml does not exist"):
        load_config(PretrainConfig, tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: x", r"c.yaml: seed must be an integer, got 'x'"),
        ("model: {layers: 2}", r"c.yaml: unknown setting 'model.layers'"),
        ("- 1", r"c.yaml: a config file must be a mapping of settings, got list"),
        ("a: [", r"c.yaml: not valid YAML"),
    ],
)
def test_wrong_file_is_named(text, message, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(PretrainConfig, path)


def test_configs_are_frozen_and_plain():
    config = PretrainConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1
    plain = config_to_dict(config)
    assert yaml.safe_load(yaml.safe_dump(plain)) == plain
    assert config_from_dict(PretrainConfig, plain) == config


def test_command_line_is_generated_from_the_dataclass():
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--config", type=PretrainConfig, default=PretrainConfig())
    arguments = ["--config.model.num_layers=3", "--config.ks=[5,20]", "--config.model.modalities=[image]"]
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    config = instantiate(parser.parse_args(arguments)).config
    assert config == PretrainConfig(model=ModelConfig(num_layers=3, modalities=("image",)), ks=(5, 20))


def test_every_setting_is_documented():
    for cls in (ModelConfig, LLMConfig, TransitionsConfig, *PRESETS):
        docs = "".join(one.__doc__ or "" for one in cls.__mro__)
        for field in dataclasses.fields(cls):
            assert f"        {field.name}: " in docs, field.name
