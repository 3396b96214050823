"use strict";
// The browser of pairs. Everything a model or a file wrote is set with textContent, never as markup.
(function () {
  const PER_PAGE = 20;
  const data = JSON.parse(document.getElementById("pair-data").textContent);
  const at = Object.fromEntries(data.columns.map((name, place) => [name, place]));
  const get = (id) => document.getElementById(id);
  const arm = get("filter-arm"), language = get("filter-language"), search = get("filter-text");
  let found = [], page = 0, texts = null;

  function element(tag, className, text) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }
  function options(select, values) {
    for (const value of values) select.append(new Option(value, value));
  }
  function number(value) {
    return value.toFixed(2).replace("-", "\u2212");
  }
  function languagesOf(pair) {
    return [data.prompts[pair[at.prompt]][1], pair[at.chosen_language], pair[at.rejected_language]].filter((code) => code);
  }
  function allTexts() {
    texts = texts || data.pairs.map((pair) => {
      const [id, , turns] = data.prompts[pair[at.prompt]];
      return [id, ...turns.map((turn) => turn[1]), pair[at.chosen], pair[at.rejected]].join("\n").toLocaleLowerCase();
    });
    return texts;
  }
  function side(pair, name) {
    const box = element("div", "side");
    box.style.setProperty("--c", `var(--${name})`);
    const std = pair[at.pool_std], score = pair[at[`${name}_score`]], sample = pair[at[`${name}_sample_id`]];
    const away = std > 0 ? (pair[at[`${name}_calibrated`]] - pair[at.pool_mean]) / std : 0;
    const where = `${away < 0 ? "\u2212" : "+"}${Math.abs(away).toFixed(1)} std`;
    const scored = score === null ? "not scored" : `score ${number(score)} (${where})`;
    const words = `${name}, ${pair[at[`${name}_language`]]}, ${scored}, ${sample < 0 ? "gold completion" : `sample ${sample}`}`;
    box.append(element("b", "", words), element("p", "", pair[at[name]]));
    return box;
  }
  function show(pair) {
    const [id, code, turns] = data.prompts[pair[at.prompt]];
    const box = element("article", "pair");
    const pool = pair[at.pool_mean] === null ? "" : ` · pool of ${pair[at.pool_size]}, mean ${number(pair[at.pool_mean])}, std ${number(pair[at.pool_std])}`;
    const flags = pair[at.flags].length ? ` · ${pair[at.flags].join(", ")}` : "";
    box.append(element("p", "id", `${pair[at.arm]} · ${code} · ${id}${pool}${flags}`));
    for (const [role, content] of turns) {
      const turn = element("p", "turn");
      if (turns.length > 1) turn.append(element("b", "", `${role} `));
      turn.append(content);
      box.append(turn);
    }
    const sides = element("div", "sides");
    sides.append(...["chosen", "rejected"].filter((name) => pair[at[name]] !== null).map((name) => side(pair, name)));
    box.append(sides);
    return box;
  }
  function render() {
    const pages = Math.max(1, Math.ceil(found.length / PER_PAGE));
    page = Math.min(Math.max(page, 0), pages - 1);
    get("pair-list").replaceChildren(...found.slice(page * PER_PAGE, (page + 1) * PER_PAGE).map((i) => show(data.pairs[i])));
    const held = data.pairs.length < data.total ? `, a spread of the run's ${data.total.toLocaleString("en")}` : "";
    get("pair-count").textContent = `${found.length.toLocaleString("en")} of ${data.pairs.length.toLocaleString("en")} pairs${held}`;
    get("pair-page").textContent = `${page + 1} of ${pages}`;
    get("pair-previous").disabled = page === 0;
    get("pair-next").disabled = page >= pages - 1;
  }
  function filter() {
    const wanted = search.value.trim().toLocaleLowerCase();
    found = [];
    for (let i = 0; i < data.pairs.length; i++) {
      const pair = data.pairs[i];
      if (arm.value && pair[at.arm] !== arm.value) continue;
      if (language.value && !languagesOf(pair).includes(language.value)) continue;
      if (wanted && !allTexts()[i].includes(wanted)) continue;
      found.push(i);
    }
    page = 0;
    render();
  }
  function turn(step) {
    page += step;
    render();
    get("pairs").scrollIntoView();
  }
  options(arm, [...new Set(data.pairs.map((pair) => pair[at.arm]))]);
  options(language, [...new Set(data.pairs.flatMap(languagesOf))].sort());
  arm.addEventListener("change", filter);
  language.addEventListener("change", filter);
  let waiting = 0;
  search.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(filter, 120); });
  get("pair-previous").addEventListener("click", () => turn(-1));
  get("pair-next").addEventListener("click", () => turn(1));
  filter();
})();
