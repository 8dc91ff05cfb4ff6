"""Settings are typed once, and a bad one says what to do."""

from pathlib import Path

import pytest

from aiscale import env
from aiscale.embedded_urls import embedded_database_url, embedded_redis_url, read_secret_key, socket_dir


def test_defaults_need_nothing() -> None:
    found = env.load({})
    assert (found.host, found.port) == ("127.0.0.1", 8000)
    assert found.models_dir == found.data_dir / "models"
    assert found.database_url == found.redis_url == ""


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("PORT", "eighty", "PORT is 'eighty'; it must be a whole number"),
        ("PORT", "70000", "PORT is 70000; it must be from 1 to 65535"),
        ("AISCALE_DEBUG", "perhaps", "AISCALE_DEBUG is 'perhaps'; it must be 1 or 0"),
        ("AISCALE_ENGINE_RUNNER", "magic", "it must be onnx or fake"),
        ("AISCALE_LOG_LEVEL", "loud", "it must be DEBUG, INFO, WARNING or ERROR"),
        ("AISCALE_TIME_ZONE", "Europe/Atlantis", "it must be a name such as Europe/Berlin or UTC"),
        ("AISCALE_TRUSTED_PROXIES", "10.0.0.1, proxy", "names 'proxy'; it must be addresses or networks"),
        ("AISCALE_TRUSTED_PROXIES", "10.0.0.1/8", "names '10.0.0.1/8'"),
        ("REDIS_URL", "http://x", "REDIS_URL must start with redis://"),
        ("SECRET_KEY_FILE", "/does/not/exist", "cannot be read"),
    ],
)
def test_a_bad_setting_is_one_clear_line(name: str, value: str, words: str) -> None:
    with pytest.raises(env.BadSetting) as refused:
        env.load({name: value})
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_a_url_that_may_hold_a_password_is_never_repeated() -> None:
    with pytest.raises(env.BadSetting) as refused:
        env.load({"DATABASE_URL": "mysql://ada:secret@db/x"})
    assert "secret" not in str(refused.value)


def test_secrets_may_come_from_files(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("from a file\n")
    assert env.load({"SECRET_KEY_FILE": str(tmp_path / "key")}).secret_key == "from a file"


def test_the_secret_key_is_made_once_and_kept_private(tmp_path: Path) -> None:
    key = read_secret_key(tmp_path / "data")
    assert len(key) > 40 and read_secret_key(tmp_path / "data") == key
    assert (tmp_path / "data" / "secret_key").stat().st_mode & 0o077 == 0
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["secret_key"]


def test_two_data_directories_have_their_own_servers(tmp_path: Path) -> None:
    short, long = tmp_path / "a", tmp_path / ("b" * 120)
    assert embedded_database_url(short) != embedded_database_url(long)
    assert embedded_redis_url(short) != embedded_redis_url(long)
    assert len(str(socket_dir(long))) <= 85


@pytest.mark.parametrize("value", ["app.example", "https://app.example/path", "https://*.example", "ftp://x"])
def test_an_origin_that_is_none_is_refused(value: str) -> None:
    with pytest.raises(env.BadSetting, match="AISCALE_CORS_ORIGINS"):
        env.load({"AISCALE_CORS_ORIGINS": value})


def test_options_of_the_files_storage_must_be_an_object() -> None:
    assert env.load({"AISCALE_FILES_OPTIONS": '{"a": 1}'}).files_options == '{"a": 1}'
    with pytest.raises(env.BadSetting, match="AISCALE_FILES_OPTIONS"):
        env.load({"AISCALE_FILES_OPTIONS": "[secret]"})
