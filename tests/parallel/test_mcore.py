import warnings

import pytest

from phsa_megatron.config.errors import DeviceError
from phsa_megatron.parallel import mcore


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("0.16.1", (0, 16, 1)), ("0.19.2", (0, 19, 2)), ("0.19.2+abc", (0, 19, 2)), ("0.17.0rc1", (0, 17, 0))],
)
def test_supported_versions_are_read(text, numbers):
    assert mcore.parse_version(text) == numbers


@pytest.mark.parametrize("text", ["0.16.0", "0.15.3", "0.20.0", "1.0", "unknown"])
def test_other_versions_are_refused_with_the_fix(text):
    with pytest.raises(DeviceError, match="megatron-core>=0.16.1,<0.20") as error:
        mcore.parse_version(text)
    assert text in str(error.value)


def test_the_installed_version_is_supported():
    assert mcore.installed_version() >= mcore.OLDEST


def test_only_known_notices_are_hidden():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        mcore.hide_known_notices()
        warnings.warn("Apex is not installed. Falling back to Torch Norm", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert [str(w.message) for w in seen] == ["something else"]
