"""Ten sentence pairs and a writer of line files, for the tests of the evaluation."""

from __future__ import annotations

from pathlib import Path


ENGLISH = [
    "The house stands near the river.",
    "Yesterday the two old friends met again in the small café behind the station, and talked until it closed.",
    "No.",
    "She bought three books, a map of the city and a bottle of water before the train left for the north.",
    "Where is the nearest hospital?",
    "The committee has postponed its decision until next week because several members were absent.",
    "It rains.",
    "I would like to return the shoes that I ordered last month, because they are too small for me.",
    "Our dog sleeps under the table.",
    "After the storm, many trees lay across the road and the fire brigade worked through the whole night.",
]
GERMAN = [
    "Das Haus steht in der Nähe des Flusses.",
    "Gestern trafen sich die zwei alten Freunde im kleinen Café hinter dem Bahnhof und redeten bis zum Schluss.",
    "Nein.",
    "Sie kaufte drei Bücher, einen Stadtplan und eine Flasche Wasser, bevor der Zug nach Norden abfuhr.",
    "Wo ist das nächste Krankenhaus?",
    "Der Ausschuss hat seine Entscheidung auf nächste Woche verschoben, weil mehrere Mitglieder fehlten.",
    "Es regnet.",
    "Ich möchte die Schuhe zurückgeben, die ich letzten Monat bestellt habe, weil sie mir zu klein sind.",
    "Unser Hund schläft unter dem Tisch.",
    "Nach dem Sturm lagen viele Bäume auf der Straße, und die Feuerwehr arbeitete die ganze Nacht.",
]


def write_lines(path: Path, lines: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path
