import pytest
from pydantic import ValidationError

from rlalign.scoring import RewardConfig, check_rewards


@pytest.mark.parametrize(
    ("use", "name"),
    [
        ("composition", "composition"),
        ("my_rewards:sharpness", "sharpness"),
        ("path/to/my rewards.py:sharpness", "sharpness"),
        ("C:\\rewards\\mine.py:sharpness", "sharpness"),
        ("https://scorer.example/v1/beauty", "beauty"),
        ("https://scorer.example/v1/beauty/?size=large", "beauty"),
        ("http://127.0.0.1:8000", "127.0.0.1_8000"),
        ("http://user:secret@host:8000/", "host_8000"),
    ],
)
def test_the_name_is_the_last_part_of_use(use: str, name: str) -> None:
    assert RewardConfig(use=use).name == name
    assert RewardConfig(use=use, name="mine").name == "mine"


def test_defaults_are_those_of_the_run_file() -> None:
    config = RewardConfig(use="ocr")
    assert (config.weight, config.role, config.timeout_s, config.retries) == (1.0, "train", 60.0, 2)
    assert (config.on_failure, config.min_group_size, config.batch_size, config.options) == ("fail", 2, None, {})
    assert RewardConfig.model_validate(config.model_dump()) == config  # what resume reads


@pytest.mark.parametrize(
    "wrong",
    [
        {"use": ""},
        {"use": "my_rewards.py"},
        {"use": 3},
        {"name": "two words"},
        {"name": "a/b"},
        {"weight": float("nan")},
        {"role": "training"},
        {"timeout_s": 0},
        {"retries": -1},
        {"backoff_s": -1},
        {"on_failure": "ignore"},
        {"min_group_size": 0},
        {"breaker_after": 0},
        {"batch_size": 0},
        {"timeout": 3},
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError) as caught:
        RewardConfig.model_validate({"use": "ocr"} | wrong)
    assert caught.value.error_count() == 1


def test_a_file_without_a_function_is_told_how_to_name_one() -> None:
    with pytest.raises(ValidationError, match=r"write mine/rewards\.py:function"):
        RewardConfig(use="mine/rewards.py")


def test_names_are_unique_and_something_is_trained() -> None:
    ocr, curve = RewardConfig(use="ocr"), RewardConfig(use="a:ocr", role="monitor")
    with pytest.raises(ValueError, match="two rewards are called 'ocr'; give one of them another `name`"):
        check_rewards([ocr, curve])
    with pytest.raises(ValueError, match="no reward has the role train"):
        check_rewards([curve])
    one, other = (RewardConfig(use=use, venv="env", pip=(use,)) for use in ("a:b", "a:c"))
    with pytest.raises(ValueError, match="two lists of packages would be installed into env; give each"):
        check_rewards([one, other])
    check_rewards([one, RewardConfig(use="a:c", venv="env"), RewardConfig(use="a:d", venv="./env", pip=("a:b",))])
    check_rewards([ocr, RewardConfig(use="a:ocr", role="monitor", name="other")])
