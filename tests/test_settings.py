"""Settings come from flags and environment, and what cannot be is refused with one sentence."""

from pathlib import Path

import pytest

from web.settings import SETTINGS, Settings, SettingsError, misspelt, read


def refused(flags: dict[str, str], environ: dict[str, str] | None = None) -> str:
    with pytest.raises(SettingsError) as error:
        read(flags, environ or {})
    return str(error.value)


ORIGIN_RULE = "each must be like https://example.org, without a path"


def test_without_anything_every_setting_has_its_default():
    assert read({}, {}) == Settings()


def test_a_flag_wins_over_the_variable_and_that_over_the_bare_name():
    environ = {"LM_SERVER_DEVICE": "cuda", "DEFAULT_DEVICE": "mps"}
    assert read({"device": "cpu"}, environ).device == "cpu"
    assert read({}, environ).device == "cuda"
    assert read({}, {"DEFAULT_DEVICE": "mps"}).device == "mps"


def test_an_empty_variable_is_not_set():
    assert read({}, {"LM_SERVER_PORT": "", "HF_TOKEN": ""}) == Settings()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("HF_TOKEN", "hf_x", {"hf_token": "hf_x"}),
        ("MAX_CONTEXT_TOKENS", "100", {"max_context_tokens": 100}),
        ("MODEL_ALLOW_LIST", "gpt2, my_model", {"model_allow_list": ("gpt2", "my_model")}),
        ("CORS_ALLOW_ORIGINS", "https://a.example", {"cors_allow_origins": ("https://a.example",)}),
        ("ENABLE_EMBEDDINGS_BACKEND", "0", {"enable_embeddings_backend": False}),
    ],
)
def test_the_well_known_bare_names_work(name, value, expected):
    settings = read({}, {name: value})
    assert {key: getattr(settings, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"port": "abc"}, "port is 'abc'; it must be a whole number"),
        ({"port": "70000"}, "port is '70000'; it must be between 0 and 65,535"),
        ({"slots": "0"}, "slots is '0'; it must be between 1 and 4,096"),
        ({"drain": "nan"}, "drain is 'nan'; it must be between 0 and 3,600"),
        ({"dtype": "int9"}, "dtype is 'int9'; it must be one of auto, fp32, bf16, int8"),
        ({"device": "tpu"}, "device is 'tpu'; it must be one of auto, cpu, cuda, mps"),
        ({"cors_allow_origins": "https://a.example,foo"}, f"cors_allow_origins is 'foo'; {ORIGIN_RULE}"),
        ({"cors_allow_origins": "*"}, f"cors_allow_origins is '*'; {ORIGIN_RULE}"),
        ({"cors_allow_origins": "https://a.b/x"}, f"cors_allow_origins is 'https://a.b/x'; {ORIGIN_RULE}"),
        ({"rate_limit": "often"}, "rate_limit is 'often'; it must be like '60 per minute'"),
        ({"model_type": "gpt2", "model_path": "out/x"}, "give one of model_type and model_path, not both"),
        ({"root": "/no/such/folder"}, "root is '/no/such/folder'; it must be a folder"),
        ({"enable_embeddings_backend": "maybe"}, "enable_embeddings_backend is 'maybe'; it must be 1 or 0"),
    ],
)
def test_a_wrong_setting_is_named_with_its_value_and_what_it_must_be(flags, sentence):
    assert refused(flags) == sentence


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("LM_SERVER_PORT", "abc", "LM_SERVER_PORT is 'abc'; it must be a whole number"),
        ("DEFAULT_DEVICE", "gpu", "DEFAULT_DEVICE is 'gpu'; it must be one of auto, cpu, cuda, mps"),
    ],
)
def test_a_wrong_variable_is_refused_by_its_own_name(name, value, sentence):
    assert refused({}, {name: value}) == sentence
    read({"port": "1", "device": "cpu"}, {name: value})  # the flag wins


def test_a_variable_that_is_nearly_a_setting_is_named_and_no_other():
    names = ["PROT", "MAX_JOB", "PORT", "URL", "NATIVE_CACHE", "NATIVE_SANITIZE", "SERVICE_HOST", "PORT_5000_TCP"]
    environ = {f"LM_SERVER_{name}": "1" for name in names} | {"PROT": "1"}
    assert misspelt(environ) == [
        "LM_SERVER_MAX_JOB is no setting and is ignored; did you mean LM_SERVER_MAX_JOBS?",
        "LM_SERVER_PROT is no setting and is ignored; did you mean LM_SERVER_ROOT or LM_SERVER_PORT?",
    ]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", ""])
def test_an_address_that_others_can_reach_needs_keys(host):
    assert "needs api_key" in refused({"host": host})
    assert read({"host": host, "api_key": "a"}, {}).keys == ("a",)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.53", "::1", "[::1]", "localhost"])
def test_loopback_addresses_need_no_keys(host):
    assert read({"host": host}, {}).loopback


def test_keys_come_from_setting_and_file(tmp_path: Path):
    file = tmp_path / "keys"
    file.write_text("two\nthree\n")
    assert read({"api_key": "one", "api_key_file": str(file)}, {}).keys == ("one", "two", "three")


def test_an_empty_or_missing_key_file_is_refused(tmp_path: Path):
    (tmp_path / "empty").write_text("\n")
    assert "holds no key" in refused({"host": "0.0.0.0", "api_key_file": str(tmp_path / "empty")})
    for host in ("0.0.0.0", "127.0.0.1"):
        missing = refused({"host": host, "api_key_file": str(tmp_path / "none")})
        assert missing.endswith("/none', which cannot be read: no such file or directory")
    (tmp_path / "binary").write_bytes(b"\xff")
    assert refused({"api_key_file": str(tmp_path / "binary")}).endswith("cannot be read: it is not UTF-8 text")


def test_keys_and_tokens_are_not_in_what_is_printed():
    settings = Settings(api_key=("sesame",), hf_token="hf_secret")
    assert "sesame" not in repr(settings) and "hf_secret" not in repr(settings)


def test_every_row_of_the_table_has_help_a_flag_and_a_variable():
    for row in SETTINGS:
        assert row.help and row.flag == f"--{row.name}" and row.variable == f"LM_SERVER_{row.name.upper()}"
