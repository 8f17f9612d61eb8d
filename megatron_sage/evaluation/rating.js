"use strict";
// The rating page: one comparison at a time. It knows two clips and a text of each, never whose they are.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const find = (id) => document.getElementById(id);
  const questions = Object.keys(data.questions), rows = [...document.querySelectorAll(".question")];
  const storageKey = `${data.format} ${data.study} ${data.rater}`;
  let answers = {}, place = 0, marked = 0;

  // Only answers to this study's items and questions are taken back.
  function restore() {
    const kept = JSON.parse(localStorage.getItem(storageKey) || "{}");
    for (const { id } of data.items) {
      const given = (kept.answers || {})[id] || {};
      for (const question of questions)
        if (data.answers.includes(given[question])) (answers[id] ||= {})[question] = given[question];
    }
    if (Number.isInteger(kept.place)) place = Math.min(Math.max(kept.place, 0), data.items.length);
  }
  function keep() {
    try { localStorage.setItem(storageKey, JSON.stringify({ answers, place })); }
    catch (error) { warn(); }
  }
  function warn() {
    find("warning").hidden = false;
    find("warning").textContent = "This browser does not keep answers: save them before you leave the page.";
  }
  try { restore(); localStorage.setItem(storageKey, JSON.stringify({ answers, place })); } catch (error) { warn(); }

  const complete = (id) => questions.every((question) => (answers[id] || {})[question]);
  const current = () => data.items[place];

  function playBoth() {
    for (const id of ["a", "b"]) { find(id).currentTime = 0; find(id).play().catch(() => {}); }
  }

  function show() {
    const item = current(), total = data.items.length;
    find("item").hidden = !item;
    find("end").hidden = Boolean(item);
    find("place").textContent = item ? `${place + 1} of ${total}` : "End";
    find("back").disabled = place === 0;
    find("replay").hidden = find("next").hidden = !item;
    find("save").classList.toggle("main", !item);
    if (item) {
      find("text").textContent = item.text;
      for (const id of ["a", "b"]) find(id).src = item[id];
      playBoth();
      marked = Math.max(0, questions.findIndex((question) => !(answers[item.id] || {})[question]));
    }
    paint();
  }

  function paint() {
    const item = current(), total = data.items.length, done = data.items.filter(({ id }) => complete(id)).length;
    find("answered").textContent = `${done} answered`;
    find("done").style.width = `${(100 * done) / total}%`;
    if (!item) {
      find("end").querySelector("p:last-child").textContent = done === total
        ? "Save your answers and send the file back."
        : `${total - done} comparisons are not complete: go back, or save what there is.`;
      return;
    }
    rows.forEach((row, number) => {
      row.classList.toggle("now", number === marked);
      for (const button of row.querySelectorAll("button"))
        button.setAttribute("aria-pressed", String((answers[item.id] || {})[questions[number]] === button.dataset.answer));
    });
    find("next").disabled = !complete(item.id);
  }

  function answer(number, value) {
    if (!current()) return;
    (answers[current().id] ||= {})[questions[number]] = value;
    marked = Math.min(number + 1, questions.length - 1);
    keep();
    paint();
  }
  function go(to) {
    place = Math.min(Math.max(to, 0), data.items.length);
    keep();
    show();
  }
  const next = () => current() && complete(current().id) && go(place + 1);

  rows.forEach((row, number) => {
    for (const button of row.querySelectorAll("button"))
      button.addEventListener("click", () => answer(number, button.dataset.answer));
  });
  find("next").addEventListener("click", next);
  find("back").addEventListener("click", () => go(place - 1));
  find("replay").addEventListener("click", playBoth);
  for (const id of ["a", "b"]) find(id).addEventListener("click", playBoth);
  find("save").addEventListener("click", () => {
    const given = {};
    for (const { id } of data.items) if (answers[id]) given[id] = answers[id];
    const content = { format: data.format, version: data.version, study: data.study, rater: data.rater, answers: given };
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([JSON.stringify(content, null, 1)], { type: "application/json" }));
    link.download = `answers_${data.study}_${String(data.rater).padStart(2, "0")}.json`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  });
  // After a click of the mouse the keys are the page's again: Enter must not press the same button once more.
  document.addEventListener("click", (event) => event.detail > 0 && document.activeElement.blur());
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
    const value = { a: "A", s: "same", b: "B", 1: "A", 2: "same", 3: "B" }[event.key.toLowerCase()];
    const onButton = event.target instanceof HTMLButtonElement;
    if (value) answer(marked, value);
    else if (event.key === "Enter" && !onButton) next(); // on a button it presses the button
    else if (event.key === "ArrowLeft") go(place - 1);
    else if (event.key === "ArrowRight") next();
    else if (event.key === "ArrowUp") { marked = Math.max(0, marked - 1); paint(); }
    else if (event.key === "ArrowDown") { marked = Math.min(questions.length - 1, marked + 1); paint(); }
    else if (event.key.toLowerCase() === "r") playBoth();
    else return;
    if (event.key.startsWith("Arrow")) event.preventDefault();
  });
  show();
})();
