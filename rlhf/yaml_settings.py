"""What is checked of a YAML file of settings before its values are."""

from __future__ import annotations

from collections.abc import Iterator

import yaml


def has_settings(text: str) -> bool:
    """Whether there is anything in a YAML text but comments.

    Raises:
        ValueError: A key is there twice, of which YAML would take the last; the message names it
            and its lines.
        yaml.YAMLError: The text is no YAML.
    """
    root = yaml.compose(text, Loader=yaml.SafeLoader)  # nodes alone: nothing is constructed
    for key, first in repeated_keys(root, set()):
        raise ValueError(
            f"line {key.start_mark.line + 1}: {key.value} stands there a second time (first in "
            f"line {first.start_mark.line + 1}); remove one of them"
        )
    return root is not None and root.tag != "tag:yaml.org,2002:null"


def repeated_keys(
    node: yaml.Node | None, seen: set[int]
) -> Iterator[tuple[yaml.ScalarNode, yaml.ScalarNode]]:
    """Each key that a mapping in ``node`` has again, with the first of its kind.

    ``seen`` holds the nodes that were looked at: an alias may lead back to one.
    """
    if not isinstance(node, yaml.CollectionNode) or id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from repeated_keys(item, seen)
        return
    keys: dict[str, yaml.ScalarNode] = {}
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode):
            first = keys.setdefault(key.value, key)
            if first is not key:
                yield key, first
        yield from repeated_keys(value, seen)
