"""Keys of users' YAML files as pydantic models: declared once, for the reader and for the schema of editors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictFloat,
    StrictInt,
    StrictStr,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from llamafactory_sekd.errors import SekdError, one_line, suggestion


def must(predicate: str) -> WrapValidator:
    """Return what words the error of a value of the wrong type: "`key` must PREDICATE, not VALUE."."""

    def check(value: Any, validate: Any) -> Any:
        try:
            return validate(value)
        except ValidationError as failure:
            if {error["type"] for error in failure.errors()} <= {"value_error", "literal_error", "unknown"}:
                raise  # it names a value inside, in words of ours
            raise ValueError(f"must {predicate}, not {value!r}.") from None

    return WrapValidator(check)


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError(f"must be text, not {text!r}.")
    return text


def _once(items: list[Any]) -> list[Any]:
    repeated = next((item for index, item in enumerate(items) if item in items[:index]), None)
    if repeated is not None:
        raise ValueError(f"names {repeated!r} twice.")
    return items


Text = Annotated[StrictStr, AfterValidator(_not_blank), must("be text")]
Texts = Annotated[list[Text], Field(min_length=1, json_schema_extra={"uniqueItems": True}), AfterValidator(_once)]
Folder = Annotated[Path, BeforeValidator(TypeAdapter(Text).validate_python), WithJsonSchema({"type": "string"})]
Count = Annotated[StrictInt, Field(ge=1), must("be an integer of at least 1")]
Number = Annotated[StrictFloat, must("be a number")]


class Keys(BaseModel):
    """Keys of a YAML file, declared once for its reader and for the schema of editors; null is as good as absent."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        names = cls.names()
        for key in given:
            if key not in names:
                unknown = PydanticCustomError("unknown", "{meant}", {"meant": suggestion(str(key), names)})
                raise ValidationError.from_exception_data(
                    cls.__name__, [{"type": unknown, "loc": (str(key),), "input": key}]
                )
        return {key: value for key, value in given.items() if value is not None}

    @classmethod
    def names(cls) -> list[str]:
        """Return the keys as the file names them, those that it must have first."""
        fields = sorted(cls.model_fields.items(), key=lambda item: not item[1].is_required())
        return [field.alias or name for name, field in fields]


_Keys = TypeVar("_Keys", bound=Keys)


def check_keys(
    kind: type[_Keys], config: Mapping[str, Any], origin: object, error: type[SekdError], where: str = ""
) -> _Keys:
    """Return the keys of a file, typed. ``where`` is the place of ``config`` in it, such as ``systems.a.``.

    A validator raises a :class:`ValueError` that goes on after the key's name, or the file's own ``error``, complete.

    Raises:
        SekdError: of the class ``error``, one line: the first key that cannot work; ``origin`` says of which file.
    """
    try:
        return kind.model_validate(config)
    except ValidationError as failure:
        first = failure.errors()[0]
    place = where + ".".join(map(str, first["loc"]))
    cause = first.get("ctx", {}).get("error")
    if first["type"] == "unknown":
        subject = f"`{place}` is unknown" if "." in place else f"{origin}: unknown key {place!r}"
        message = subject + first["msg"]
    elif first["type"] == "missing":
        message = f"{origin}: the key `{place}` is missing."
    elif isinstance(cause, error):
        message = str(cause)
    elif isinstance(cause, SekdError):
        message = f"`{place}`: {cause}"
    elif cause is not None:
        message = f"`{place}` {cause}"
    else:
        expected = first["msg"].removeprefix("Input should be ").replace("'", "")
        message = f"`{place}` must be {expected}, not {first['input']!r}."
    raise error(one_line(message))
