// Filters, sorting and the enlarged view. The state lives in the address (#verdict=rejected&stratum=…&q=…&sort=…&id=…),
// so a view can be sent as a link; the page reads well without this script, too.
"use strict";
(() => {
  const root = document.documentElement;
  root.classList.add("js");
  const form = document.getElementById("filter");
  const grid = document.getElementById("grid");
  const output = document.getElementById("shown");
  const dialog = document.getElementById("enlarged");
  const cards = [...grid.children];
  const facts = JSON.parse(document.getElementById("facts").textContent);
  const defaults = { verdict: "", stratum: "", q: "", sort: "high" };
  let visible = cards;
  let open = null;

  const score = (card) => (card.dataset.score === "" ? null : Number(card.dataset.score));
  const prompt = (card) => card.querySelector(".prompt").textContent;
  const byScore = (sign) => (a, b) => {
    const [x, y] = [score(a), score(b)];
    return x === null || y === null ? (x === null) - (y === null) : sign * (x - y);
  };
  const byPrompt = (a, b) => prompt(a).localeCompare(prompt(b)) || byScore(-1)(a, b);
  const orders = { high: byScore(-1), low: byScore(1), prompt: byPrompt };
  const text = new Map(cards.map((card) => [card, `${prompt(card)} ${card.id}`.toLowerCase()]));

  function state() {
    const entries = Object.keys(defaults).map((name) => [name, form.elements[name].value]);
    return Object.fromEntries(entries);
  }

  function readAddress() {
    const asked = new URLSearchParams(location.hash.slice(1));
    for (const name of Object.keys(defaults)) {
      const field = form.elements[name];
      field.value = asked.get(name) ?? defaults[name];
      if (field.value === "" && name === "sort") field.value = defaults.sort;
    }
    if (![...form.elements.verdict].some((radio) => radio.checked)) form.elements.verdict.value = "";
    if (form.elements.stratum.selectedIndex < 0) form.elements.stratum.value = "";
    apply();
    const card = document.getElementById(asked.get("id") ?? "");
    if (card && cards.includes(card)) show(card);
  }

  function writeAddress() {
    const asked = new URLSearchParams();
    for (const [name, value] of Object.entries(state())) if (value !== defaults[name]) asked.set(name, value);
    if (open) asked.set("id", open.id);
    history.replaceState(null, "", asked.size ? `#${asked}` : location.pathname + location.search);
  }

  function apply() {
    const { verdict, stratum, q, sort } = state();
    const words = q.toLowerCase().split(/\s+/).filter(Boolean);
    for (const card of cards) {
      card.hidden =
        (verdict !== "" && card.dataset.verdict !== verdict) ||
        (stratum !== "" && card.dataset.stratum !== stratum) ||
        !words.every((word) => text.get(card).includes(word));
    }
    cards.sort(orders[sort]);
    grid.append(...cards);
    visible = cards.filter((card) => !card.hidden);
    output.textContent = `${visible.length.toLocaleString("en")} of ${cards.length.toLocaleString("en")} images`;
    document.getElementById("nothing").hidden = visible.length > 0;
  }

  function show(card) {
    open = card;
    const part = (name) => dialog.querySelector(`.${name}`);
    const image = card.querySelector("img");
    part("picture").replaceChildren(image ? image.cloneNode() : card.querySelector(".blank").cloneNode(true));
    part("prompt").textContent = prompt(card);
    part("verdict").replaceChildren(...[...card.querySelector(".judgement").childNodes].map((n) => n.cloneNode(true)));
    const list = part("facts");
    list.replaceChildren();
    for (const [name, value] of Object.entries(facts[card.id].facts)) {
      const [term, detail] = [document.createElement("dt"), document.createElement("dd")];
      term.textContent = name;
      detail.textContent = value;
      detail.dir = "auto";
      list.append(term, detail);
    }
    part("trace").textContent = facts[card.id].trace;
    const place = visible.indexOf(card);
    part("place").textContent = place < 0 ? "" : `${place + 1} of ${visible.length}`;
    if (!dialog.open) dialog.showModal();
    writeAddress();
  }

  function step(by) {
    if (visible.length) show(visible[(visible.indexOf(open) + by + visible.length) % visible.length]);
  }

  async function copy(button) {
    const code = button.parentElement.querySelector("code");
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(code);
      button.textContent = "Press Ctrl+C";
    }
    setTimeout(() => (button.textContent = "Copy"), 2000);
  }

  form.addEventListener("input", () => { apply(); writeAddress(); });
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(() => { apply(); writeAddress(); }));
  grid.addEventListener("click", (event) => {
    if (event.target.closest(".open")) show(event.target.closest(".card"));
  });
  dialog.addEventListener("close", () => {
    const last = open;
    open = null;
    writeAddress();
    if (last && !last.hidden) last.querySelector(".open").focus();
  });
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog || event.target.closest(".close")) dialog.close();
    else if (event.target.closest(".previous")) step(-1);
    else if (event.target.closest(".next")) step(1);
  });
  dialog.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
  });
  document.addEventListener("click", (event) => {
    if (event.target.closest(".copy")) copy(event.target.closest(".copy"));
  });
  addEventListener("hashchange", () => {
    if (location.hash && !location.hash.includes("=")) return; // a plain anchor of the page
    readAddress();
    if (!open) document.getElementById("images").scrollIntoView();
  });
  readAddress();
})();
