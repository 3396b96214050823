"use strict";
// The list of rows and the row that is open. Only the rows in view are in the document, so ten thousand are as quick as
// ten. Everything a model or a file wrote is set with textContent, never as markup.
(async function () {
  const get = (id) => document.getElementById(id);
  if (!window.DecompressionStream) {
    get("too-old").hidden = false;
    return;
  }
  const packed = Uint8Array.from(atob(get("rows-data").textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const { texts, prompts, kinds } = JSON.parse(await new Response(stream).text());
  const [ARM, PROMPT, TAGS, LANGUAGES, NOTE, FIRST, FIRST_TEXT, SECOND, SECOND_TEXT, ORDER] = Array(10).keys();
  const arm = get("filter-arm"), language = get("filter-language"), tag = get("filter-tag");
  const sort = get("sort"), search = get("filter-text"), list = get("rows"), spacer = get("spacer"), detail = get("detail");
  const HEIGHT = 58; // of a row, as in the style sheet
  let kind = null, found = [], chosen = 0, lower = null;

  function element(tagName, className, text) {
    const made = document.createElement(tagName);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }
  const count = (number) => number.toLocaleString("en");
  const promptOf = (row) => prompts[row[PROMPT]];
  const languagesOf = (row) => [promptOf(row)[1], ...row[LANGUAGES].map((place) => texts[place])];
  function asked(row) {
    const turns = promptOf(row)[2];
    return turns.length ? texts[turns[turns.length - 1]] : "";
  }
  function fill(select, values, fewest) {
    const before = select.value;
    select.replaceChildren(new Option("all", ""), ...values.map((value) => new Option(value, value)));
    select.value = values.includes(before) ? before : "";
    select.parentElement.hidden = values.length < fewest;
  }

  // which texts hold the words: each is looked at once, however many rows have it
  function holding(words) {
    lower = lower || texts.map((text) => text.toLocaleLowerCase());
    const holds = new Uint8Array(texts.length);
    for (let i = 0; i < lower.length; i++) holds[i] = lower[i].includes(words) ? 1 : 0;
    return holds;
  }
  function filter() {
    const words = search.value.trim().toLocaleLowerCase(), holds = words ? holding(words) : null;
    found = kind.rows.filter((row) => {
      if (arm.value && texts[row[ARM]] !== arm.value) return false;
      if (language.value && !languagesOf(row).includes(language.value)) return false;
      if (tag.value && !row[TAGS].some((place) => texts[place] === tag.value)) return false;
      if (!holds) return true;
      const [id, , turns] = promptOf(row);
      return holds[row[FIRST_TEXT]] || holds[row[SECOND_TEXT]] || holds[row[NOTE]]
        || turns.some((place, i) => i % 2 && holds[place]) || id.toLocaleLowerCase().includes(words);
    });
    if (kind.order && sort.value) {
      const sign = sort.value === "up" ? 1 : -1;
      found.sort((a, b) => sign * ((a[ORDER] ?? -Infinity) - (b[ORDER] ?? -Infinity)));
    }
    const spread = kind.rows.length < kind.total ? `; the page holds a spread of the run's ${count(kind.total)}` : "";
    get("count").textContent = `${count(found.length)} of ${count(kind.rows.length)} rows${spread}`;
    spacer.style.height = `${found.length * HEIGHT}px`;
    list.scrollTop = 0;
    select(0);
  }
  function option(place) {
    const row = found[place], made = element("div", "option");
    made.id = `row-${place}`;
    made.style.top = `${place * HEIGHT}px`;
    made.setAttribute("role", "option");
    made.setAttribute("aria-selected", String(place === chosen));
    made.setAttribute("aria-posinset", String(place + 1));
    made.setAttribute("aria-setsize", String(found.length));
    const top = element("span", "top");
    top.append(element("b", "", promptOf(row)[1]), element("span", "", texts[row[ARM]]));
    if (row[ORDER] !== null) top.append(element("span", "gap", `gap ${row[ORDER].toFixed(2)}`));
    else if (row[TAGS].length) top.append(element("span", "gap", texts[row[TAGS][0]]));
    made.append(top, element("span", "excerpt", (asked(row) || promptOf(row)[0]).slice(0, 160)));
    made.addEventListener("click", () => select(place));
    return made;
  }
  function draw() {
    const first = Math.max(0, Math.floor(list.scrollTop / HEIGHT) - 4);
    const last = Math.min(found.length, Math.ceil((list.scrollTop + list.clientHeight) / HEIGHT) + 4);
    const places = new Set(Array.from({ length: Math.max(0, last - first) }, (_, i) => first + i));
    if (found.length) places.add(chosen); // what is selected stays, for those who listen to the page
    spacer.replaceChildren(...[...places].sort((a, b) => a - b).map(option));
  }
  function select(place) {
    chosen = Math.min(Math.max(place, 0), Math.max(0, found.length - 1));
    const top = chosen * HEIGHT;
    if (top < list.scrollTop) list.scrollTop = top;
    if (top + HEIGHT > list.scrollTop + list.clientHeight) list.scrollTop = top + HEIGHT - list.clientHeight;
    draw();
    if (found.length) list.setAttribute("aria-activedescendant", `row-${chosen}`);
    else list.removeAttribute("aria-activedescendant");
    show();
  }
  function side(row, caption, text, name) {
    const box = element("div", `side ${name}`), words = texts[row[caption]], colon = words.indexOf(": ");
    const head = element("p", "caption");
    head.append(element("b", "", colon < 0 ? words : words.slice(0, colon)), colon < 0 ? "" : ` ${words.slice(colon + 2)}`);
    const shown = texts[row[text]];
    box.append(head, shown ? element("p", "text", shown) : element("p", "text none", "(empty)"));
    return box;
  }
  function show() {
    const row = found[chosen];
    if (!row) {
      detail.replaceChildren(element("p", "none", "Nothing matches these filters."));
      return;
    }
    const [id, code, turns] = promptOf(row), parts = [], [note, ...said] = texts[row[NOTE]].split("\n\n");
    parts.push(element("p", "id", [texts[row[ARM]], code, id, note].filter(Boolean).join(" · ")));
    if (row[TAGS].length) {
      const tags = element("p", "tags");
      for (const place of row[TAGS]) tags.append(element("span", "", texts[place]));
      parts.push(tags);
    }
    for (let i = 0; i < turns.length; i += 2) {
      const turn = element("p", "turn");
      if (turns.length > 2) turn.append(element("b", "", `${texts[turns[i]]} `));
      turn.append(texts[turns[i + 1]]);
      parts.push(turn);
    }
    const sides = element("div", "sides");
    if (row[FIRST] >= 0) sides.append(side(row, FIRST, FIRST_TEXT, "first"));
    if (row[SECOND] >= 0) sides.append(side(row, SECOND, SECOND_TEXT, "second"));
    detail.replaceChildren(...parts, sides, ...said.map((paragraph) => element("p", "said", paragraph)));
    detail.scrollTop = 0;
  }
  function open(name) {
    kind = kinds[name];
    get("tag-name").textContent = kind.tag;
    get("sorting").hidden = !kind.order;
    fill(arm, [...new Set(kind.rows.map((row) => texts[row[ARM]]))], 2);
    fill(language, [...new Set(kind.rows.flatMap(languagesOf))].sort(), 2);
    fill(tag, [...new Set(kind.rows.flatMap((row) => row[TAGS].map((place) => texts[place])))].sort(), 1);
    list.setAttribute("aria-label", kind.title);
    filter();
  }

  const jumps = { ArrowDown: 1, ArrowUp: -1, PageDown: 8, PageUp: -8, Home: -Infinity, End: Infinity };
  list.addEventListener("keydown", (event) => {
    if (event.key in jumps && !event.ctrlKey && !event.metaKey && !event.altKey) {
      event.preventDefault();
      select(chosen + jumps[event.key]);
    } else if (event.key === "Enter") detail.focus();
  });
  detail.addEventListener("keydown", (event) => { if (event.key === "Escape") list.focus(); });
  addEventListener("keydown", (event) => {
    const typing = event.target.closest && event.target.closest("input, select, textarea");
    if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) {
      event.preventDefault();
      search.focus();
    }
  });
  let waiting = 0;
  search.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(filter, 120); });
  for (const select of [arm, language, tag, sort]) select.addEventListener("change", filter);
  get("kinds").addEventListener("change", (event) => open(event.target.value));
  document.querySelector(".filters").addEventListener("submit", (event) => event.preventDefault());
  let drawing = false;
  list.addEventListener("scroll", () => {
    if (drawing) return;
    drawing = true;
    requestAnimationFrame(() => { drawing = false; draw(); });
  });
  get("browser").hidden = false;
  const names = Object.keys(kinds);
  if (names.length) open(document.querySelector("#kinds input:checked").value);
  new ResizeObserver(() => { if (kind) draw(); }).observe(list);
})();
