from pathlib import Path

import pytest
import yaml

from odcft.errors import OdcftError
from odcft.recipe import DEFAULT, Recipe, dump, load_recipe, make_recipe, set_lines, shipped


def test_default_is_the_papers_fine_tuning():
    recipe = load_recipe()
    assert recipe.optim.epochs == 120
    assert recipe.memory.clusters == "auto"  # 10,000 for ImageNet
    assert recipe == load_recipe(DEFAULT)


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipes_load_and_say_what_they_are(name):
    load_recipe(name)
    assert shipped()[name].startswith("# ")


def test_the_promised_recipes_are_shipped():
    promised = {"odc_r50_finetune", "odc_r50_scratch", "odc_alexnet", "dc_r50_finetune", "codc_r50", "odc_vit", "small"}
    promised |= {"fast", "odc_small", "dc_small", "dc_r50_scratch", "small_vit"}
    assert promised <= set(shipped())
    methods = {name: load_recipe(name).method for name in promised}
    assert methods.pop("dc_r50_finetune") == "dc"
    assert methods.pop("dc_small") == "dc"
    assert methods.pop("dc_r50_scratch") == "dc"
    assert methods.pop("codc_r50") == "codc"
    assert set(methods.values()) == {"odc"}
    assert load_recipe("odc_r50_scratch").optim.epochs == 440
    assert load_recipe("odc_vit").optim.optimizer == "adamw"


def test_dc_from_scratch_is_odc_from_scratch_with_the_papers_rate_and_sobel():
    odc, dc = load_recipe("odc_r50_scratch"), load_recipe("dc_r50_scratch")
    for group in ("data", "augment", "kmeans"):
        assert getattr(odc, group) == getattr(dc, group)
    assert (dc.backbone.input, dc.optim.lr) == ("sobel", 0.1)  # sec. 4.1
    assert odc.optim == dc.optim.model_copy(update={"lr": 0.06})
    assert odc.memory.clusters == dc.memory.clusters


def test_dc_small_is_small_but_for_what_is_dcs_own():
    small, dc = load_recipe("small"), load_recipe("dc_small")
    for group in ("data", "augment", "dc", "kmeans"):
        assert getattr(small, group) == getattr(dc, group)
    assert small.memory.clusters == dc.memory.clusters
    same = ("epochs", "batch_size", "momentum", "weight_decay", "head_momentum")
    assert [getattr(small.optim, f) for f in same] == [getattr(dc.optim, f) for f in same]


def test_small_vit_is_small_but_for_its_optimizer():
    small, vit = load_recipe("small"), load_recipe("small_vit")
    for group in ("data", "augment", "neck", "memory", "kmeans"):
        assert getattr(small, group) == getattr(vit, group)
    assert (vit.optim.optimizer, vit.optim.freeze, vit.optim.auto_steps) == ("adamw", 0, small.optim.auto_steps)


def test_yaml_and_object_say_the_same():
    recipe = load_recipe("small")
    assert make_recipe(yaml.safe_load(dump(recipe))) == recipe


def test_default_recipe_writes_out_every_field():
    assert yaml.safe_load(shipped()[DEFAULT]) == yaml.safe_load(
        dump(Recipe.model_validate(yaml.safe_load(shipped()[DEFAULT])))
    )


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("memory.momentun=0.3", "memory.momentun: no such field. Did you mean memory.momentum?"),
        ("memori.momentum=0.3", "memori: no such field. Did you mean memory?"),
        ("lr=0.1", "lr: no such field. Did you mean optim.lr?"),
        ("memory.momentum", "write it as group.field=value"),
        ("memory.momentum=2", "memory.momentum=2 is not valid: "),
        ("memory.clusters=many", "memory.clusters='many' is not valid: "),
        ("augment.crop_scale=[1.0, 0.2]", "a range is [low, high]"),
        ("memory=3", "this is a group of fields"),
        (
            "codc.members=[{clutser: 1}]",
            "codc.members[0].clutser: no such field. Did you mean codc.members[0].cluster?",
        ),
        ("codc.members=3", "codc.members=3 is not valid: "),
        ("seed.x=3", "seed has no fields of its own"),
    ],
)
def test_mistakes_are_refused_with_a_hint(override, hint):
    with pytest.raises(OdcftError) as error:
        load_recipe("small", [override])
    assert hint in str(error.value)


def test_unknown_field_in_a_file_is_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("optim: {epoch: 3}\n")
    with pytest.raises(OdcftError, match=r"optim\.epoch: no such field\. Did you mean optim\.epochs\?"):
        load_recipe(path)


def test_broken_yaml_names_the_line(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("optim:\n  epochs: [3\nseed: 1\n")
    with pytest.raises(OdcftError, match=r"not valid YAML \(line 3\)"):
        load_recipe(path)


def test_unknown_recipe_is_refused_with_the_nearest():
    with pytest.raises(OdcftError, match="did you mean small"):
        load_recipe("smal")


def test_numbers_like_1e_5_are_numbers():
    assert load_recipe("small", ["optim.lr=1e-3"]).optim.lr == 1e-3


@pytest.mark.parametrize("text", ["optim: {lr: 0.1}\noptim: {epochs: 3}\n", "data:\n  size: 32\n  size: 64\n"])
def test_field_that_is_there_twice_is_refused(tmp_path, text):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(OdcftError, match=r"is not valid YAML \(line [23]\): (optim|size) appears twice"):
        load_recipe(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize("value", ["on", "off", "auto"])
def test_on_and_off_need_no_quotes(tmp_path, value):
    """YAML reads them as true and false."""
    (tmp_path / "mine.yaml").write_text(f"optim: {{sync_bn: {value}}}")
    for recipe in (load_recipe(str(tmp_path / "mine.yaml")), load_recipe("small", [f"optim.sync_bn={value}"])):
        assert recipe.optim.sync_bn == value
        assert make_recipe(yaml.safe_load(dump(recipe))) == recipe
    for wrong in ("1", "yes please", "null"):
        with pytest.raises(OdcftError, match=r"optim\.sync_bn="):
            load_recipe("small", [f"optim.sync_bn={wrong}"])


def test_fast_is_small_in_fewer_steps():
    assert load_recipe("fast") == load_recipe("small", ["optim.auto_steps=1600"])


def test_numbers_of_numpy_are_numbers():
    import numpy as np

    given = {"seed": np.int64(3), "optim.lr": np.float32(0.5), "memory.momentum": np.float64(0.25)}
    recipe = load_recipe("small", set_lines(given))
    assert (recipe.seed, recipe.optim.lr, recipe.memory.momentum) == (3, 0.5, 0.25)
    with pytest.raises(OdcftError, match=r"Path.* Give numbers, text, lists and dicts"):
        set_lines({"data.size": Path("32")})
