// From names to ids and back, as lora_lib/tokens.py does it.

export const [BOS, SEP, EOS, UNK, SPECIAL] = [1, 2, 3, 4, 6]; // the first six ids are special

export class Tokenizer {
  constructor(characters) {
    this.characters = [...characters];
    this.ids = new Map(this.characters.map((character, i) => [character, SPECIAL + i]));
  }

  /** Characters after NFD: é is e and an accent, a Hangul syllable is its letters. */
  encode(text) {
    return [...text.normalize("NFD")].map((character) => this.ids.get(character) ?? UNK);
  }

  /** The character of an id, nothing for a special one but �, unknown. */
  character(id) {
    return id === UNK ? "\ufffd" : (this.characters[id - SPECIAL] ?? "");
  }

  decode(ids) {
    return ids.map((id) => this.character(id)).join("").normalize("NFC");
  }

  /** What the model continues. */
  prompt(latin) {
    return [BOS, ...this.encode(latin), SEP];
  }
}

/** Why `name` cannot be written, and what to do, in the words of lora_course/widgets.py; or "". */
export function problem(name, { readable, room }) {
  const strange = [...new Set(name)].filter((character) => !readable.includes(character));
  if (strange.length) {
    return `The adapters read names in Latin letters and cannot read “${strange.slice(0, 5).join("”, “")}”.
      Try a name such as Yerevan or São Paulo.`;
  }
  if (!/\p{L}/u.test(name)) return "Type the name of a town in Latin letters, such as Yerevan.";
  const { length } = name.normalize("NFD");
  if (length <= room) return "";
  return `This name has ${length} characters, and the model has room for ${room}. Shorten it.`;
}
