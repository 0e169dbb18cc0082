// What a search finds: the lessons first, then the other pages, the library's source last.
const parts = [["notebooks/0", 20], ["notebooks/solutions", -10], ["lora_lib/", -40]];

// The weights are Sphinx's own.
var Scorer = {
  score: ([docname, title, anchor, description, score]) =>
    parts.reduce((sum, [start, points]) => sum + (docname.startsWith(start) ? points : 0), score),
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: {0: 15, 1: 5, 2: -5},
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
